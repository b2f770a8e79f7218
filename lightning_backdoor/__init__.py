"""Training-time defence against backdoors, as drop-in callbacks for PyTorch Lightning."""

from lightning_backdoor import attacks, baselines, functional, metrics, report
from lightning_backdoor.callbacks import BackdoorMonitor, DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.scanning.measurements import measure
from lightning_backdoor.verdict import Finding, Verdict

__version__ = "0.1.0"

__all__ = [
    "BackdoorMonitor",
    "DBRCallback",
    "DSTCallback",
    "Finding",
    "NONECallback",
    "UltraCleanCallback",
    "Verdict",
    "attacks",
    "baselines",
    "functional",
    "measure",
    "metrics",
    "report",
]
