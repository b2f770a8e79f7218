"""The report of a defense in a running fit: what it shows, and where it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.data.nesting import class_names
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.of_events import evidence
from lightning_backdoor.report.writer import write_report
from lightning_backdoor.responses.base import Session

__all__ = ["report_folder", "report_verdict"]


def report_folder(report_dir: str | None, name: str | None, own: str, logs: str | None) -> Path:
    """The user's folder, else one beside the logs.

    Args:
        report_dir: The user's ``report_dir``.
        name: The user's ``name``.
        own: Name of the defense in file names.
        logs: Folder of the logger; ``None``: the present one.
    """
    if report_dir is None:
        return Path(logs or ".") / "lightning_backdoor" / own
    return Path(report_dir) if name is None else Path(report_dir) / own


def report_verdict(
    session: Session,
    detector: Detector,
    folder: Path,
    *,
    seconds: float,
    max_removed: float,
    callback: str = "",
    false_alarm_rate: float | None = None,
    diagnosis_follows: bool = False,
) -> None:
    """Write the report of the verdict in force; a failure is a warning. Call it on one process only.

    Args:
        session: Of the running fit.
        detector: What measured the samples.
        folder: Where to write.
        seconds: Duration of the last detection.
        max_removed: The user's ``max_removed``.
        callback: Name of the class of the defense.
        false_alarm_rate: The user's ``false_alarm_rate``; ``None`` where the defense has none.
        diagnosis_follows: Whether findings without a diagnosis will have one at the end of training.
    """
    with isolated_rng():
        try:
            shown = replace(
                _shown(session, detector, seconds, max_removed),
                callback=callback,
                false_alarm_rate=false_alarm_rate,
                diagnosis_follows=diagnosis_follows,
            )
            write_report(folder, session.verdict, method=session.case.title, evidence=shown)
        except Exception as error:  # a picture must never end somebody's training
            rank_zero_warn(f"The report in {folder} is incomplete: {type(error).__name__}: {error}")


def _shown(session: Session, detector: Detector, seconds: float, max_removed: float) -> Evidence:
    scanner = session.scanner
    shown = evidence(
        session.case.history,
        session.verdict,
        images=scanner.images,
        denoised=detector.denoised_for(session),
        read_with=scanner.transform.description,
        classes=class_names(scanner.loader.dataset),
        meaning=detector.meaning,
        by_subpopulations=detector.by_subpopulations,
        seconds=seconds,
        max_removed=max_removed,
    )
    approved, further = session.case.approved, {}
    if approved is not None:
        further["images that you have approved (kept)"] = int(approved.sum())
    if unread := int(scanner.unread.sum()):
        further["images that `collate_fn` drops (kept, not looked at)"] = unread
    return replace(shown, facts={**shown.facts, **further})
