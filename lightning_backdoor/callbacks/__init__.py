"""Lightning callbacks: the defenses, the base that they share, and a monitor for evidence."""

from lightning_backdoor.callbacks.base import Defense, Detector, chosen_response
from lightning_backdoor.callbacks.dbr import DBRCallback
from lightning_backdoor.callbacks.dst import DSTCallback
from lightning_backdoor.callbacks.monitor import BackdoorMonitor
from lightning_backdoor.callbacks.none import NONECallback
from lightning_backdoor.callbacks.options import ScanArguments
from lightning_backdoor.callbacks.ultraclean import UltraCleanCallback

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
