"""Write the report of a verdict."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.files import atomic_file
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.figures import contact_sheet, histogram
from lightning_backdoor.report.page import page
from lightning_backdoor.report.portraits import portray
from lightning_backdoor.report.sentences import summarize
from lightning_backdoor.report.table import class_rows, csv_chunks
from lightning_backdoor.report.tiles import choose, collect
from lightning_backdoor.verdict import Verdict

__all__ = ["write_report"]

_WITHOUT_MATPLOTLIB = (
    "The histogram and the contact sheet need matplotlib, which is not installed here. "
    "`pip install 'lightning-backdoor[report]'` brings it."
)


def _matplotlib_is_here() -> bool:
    try:
        return find_spec("matplotlib") is not None
    except ValueError:  # hidden on purpose: sys.modules["matplotlib"] is None
        return False


def _put(path: Path, content: bytes | None) -> None:
    """Write a file; without content remove the one that an earlier report left."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as file:
        file.write(content)


def write_report(
    folder: str | PathLike[str], verdict: Verdict, *, method: str, evidence: Evidence | None = None
) -> Path:
    """Write a verdict as a table, pictures and one page to read.

    ``folder`` receives ``verdict.csv``, ``histogram.png``, ``suspicious.png`` (if the evidence has images) and
    ``report.html``, which holds the pictures and loads nothing; on it images can be marked as fine, and the table with
    the marks be downloaded as ``reviewed.csv``. The table is written first, so it is there even if
    a picture fails. Each file appears under its name when it is complete. Without matplotlib the two PNG files and
    the histogram on the page are left out, and the page states it. Call it on one process only.

    Args:
        folder: Where to write; made if it is missing. Files of an earlier report are replaced.
        verdict: The verdict, ``N`` samples, at least one.
        method: Name of the defence, for example ``"UltraClean"``.
        evidence: Images, class names, facts and what happened to the training.

    Returns:
        Path of ``report.html``.

    Raises:
        ArgumentError: If ``folder`` is a file, the verdict is empty, or ``evidence`` returns something else than
            it promises.
    """
    evidence = Evidence() if evidence is None else evidence
    if len(verdict) == 0:
        raise ArgumentError("`verdict` must hold at least one sample, got 0. Scan a dataset that has images.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArgumentError(
            f"`report_dir` must be a folder, got '{folder}', where a file is in the way. Choose another folder."
        ) from error
    with atomic_file(folder / "verdict.csv") as file:
        for chunk in csv_chunks(verdict):
            file.write(chunk.encode())
    groups, rows, drawn = choose(verdict), class_rows(verdict), _matplotlib_is_here()
    exhibits = collect(groups, evidence)
    portraits, pixels = portray(verdict, evidence)
    picture = histogram(verdict) if drawn else None
    summary = summarize(verdict, method, rows, evidence)
    note = "" if drawn else _WITHOUT_MATPLOTLIB
    text = page(
        verdict,
        method=method,
        evidence=evidence,
        summary=summary,
        rows=rows,
        groups=groups,
        exhibits=exhibits,
        portraits=portraits,
        pixels=pixels,
        histogram=picture,
        folder=folder,
        note=note,
    )
    _put(folder / "histogram.png", picture)
    _put(folder / "suspicious.png", contact_sheet(exhibits, verdict, evidence) if drawn and exhibits else None)
    _put(folder / "report.html", text.encode())
    return folder / "report.html"
