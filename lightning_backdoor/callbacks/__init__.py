"""Lightning callbacks: the defences, and a monitor for evidence."""

from lightning_backdoor.callbacks.dbr import DBRCallback
from lightning_backdoor.callbacks.dst import DSTCallback
from lightning_backdoor.callbacks.monitor import BackdoorMonitor
from lightning_backdoor.callbacks.none import NONECallback
from lightning_backdoor.callbacks.ultraclean import UltraCleanCallback

__all__ = ["BackdoorMonitor", "DBRCallback", "DSTCallback", "NONECallback", "UltraCleanCallback"]
