"""Lightning callbacks: the defenses, the base that they share, and a monitor for evidence."""

from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.dbr import DBRCallback
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.dst import DSTCallback
from lightning_backdoor.callbacks.monitor import BackdoorMonitor
from lightning_backdoor.callbacks.none import NONECallback
from lightning_backdoor.callbacks.options import ScanArguments
from lightning_backdoor.callbacks.ultraclean import UltraCleanCallback
from lightning_backdoor.responses.by_name import chosen_response

__all__ = [
    "BackdoorMonitor",
    "DBRCallback",
    "DSTCallback",
    "Defense",
    "Detector",
    "NONECallback",
    "ScanArguments",
    "UltraCleanCallback",
    "chosen_response",
]
