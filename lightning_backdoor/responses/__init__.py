"""What is done about a verdict: restart, continue, reset units, unlearn, train in two stages, or report alone."""

from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Continue, Detection, Report, Response, Session
from lightning_backdoor.responses.fallback import WithFallback
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.two_stage import Recipe, TwoStage
from lightning_backdoor.responses.unlearn import Unlearn

__all__ = [
    "Continue",
    "Detection",
    "Event",
    "Recipe",
    "Report",
    "ResetUnits",
    "Response",
    "Restart",
    "Session",
    "TwoStage",
    "Unlearn",
    "WithFallback",
]
