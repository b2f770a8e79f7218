"""What a person reads after a defence has acted."""

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.writer import write_report

__all__ = ["Evidence", "write_report"]
