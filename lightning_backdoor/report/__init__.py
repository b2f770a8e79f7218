"""The report of a verdict: table, pictures, and one page."""

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.triggers import trigger_sheet, write_trigger_sheet
from lightning_backdoor.report.writer import write_report

__all__ = ["Evidence", "trigger_sheet", "write_report", "write_trigger_sheet"]
