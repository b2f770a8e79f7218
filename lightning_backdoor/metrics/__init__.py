"""torchmetrics classes that need the ground truth: for benchmarks, examples and the monitor, not for a defence."""

from lightning_backdoor.metrics.attack import AttackSuccessRate, RecoveredAccuracy
from lightning_backdoor.metrics.detection import DetectionRates
from lightning_backdoor.metrics.natural import REASR

__all__ = ["REASR", "AttackSuccessRate", "DetectionRates", "RecoveredAccuracy"]
