"""Training-time defence against backdoors, as drop-in callbacks for PyTorch Lightning.

The defenses, ``audit`` and ``measure`` are here. The modules:

- ``callbacks``: the bases of a defense of your own, ``Defense`` and ``Detector``.
- ``responses``: what is done about a verdict, with settings of its own to pass as ``response=``, e.g. ``Unlearn``.
- ``functional``: scores and decisions on tensors.
- ``attacks``, ``baselines``, ``metrics``: for comparisons.
- ``report``: pages and figures.
"""

from lightning_backdoor import attacks, baselines, callbacks, functional, metrics, report, responses
from lightning_backdoor.audit import audit
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
    "audit",
    "baselines",
    "callbacks",
    "functional",
    "measure",
    "metrics",
    "report",
    "responses",
]
