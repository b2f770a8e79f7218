"""One self-contained HTML page to read."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Collection, Sequence
from html import escape

from torch import Tensor

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.sentences import Summary, count, number, percent, score
from lightning_backdoor.report.style import CSS
from lightning_backdoor.report.table import ClassRow
from lightning_backdoor.report.tiles import Exhibit, Group
from lightning_backdoor.verdict import Verdict

__all__ = ["page"]

_CLASS_ROWS = 30
_REMOVED_ROWS = 100
_TABLE_ROWS = 100


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _tile_png(tile: Tensor) -> bytes:
    """Encode a tile, uint8, shape ``(H, W, 3)``."""
    from PIL import Image  # noqa: PLC0415  (slow to import, and only reports need it)

    file = io.BytesIO()
    Image.fromarray(tile.numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


def _prose(text: str) -> str:
    """Escape a sentence and set what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _table(head: list[str], rows: list[list[str]], kind: str = "", numbers: Collection[int] = ()) -> str:
    """Build a table of cells that are HTML already; ``numbers`` are the columns that are aligned to the right."""
    marks = [' class="number"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{mark}>{cell}</th>' for cell, mark in zip(head, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>\n"
        for row in rows
    )
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _label(verdict: Verdict, evidence: Evidence, position: int) -> str:
    return "" if verdict.labels is None else escape(evidence.class_name(int(verdict.labels[position])))


def _summary(summary: Summary) -> str:
    parts = {
        "What was looked at": summary.looked,
        "What was found": summary.found,
        "What was done": summary.done,
        "What to do next": summary.then,
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{_prose(text)}</dd>\n" for name, text in parts.items()) + "</dl>"


def _facts(verdict: Verdict, method: str, evidence: Evidence) -> str:
    total, removed = len(verdict), int((~verdict.keep).sum())
    threshold = number(verdict.threshold) if abs(verdict.threshold) != float("inf") else "none"
    facts = {
        "Method": method,
        "Rule": verdict.rule,
        "Threshold": threshold,
        "Training images": total,
        "Removed": f"{removed:,} ({percent(removed, total)})",
        "Kept": total - removed,
        **evidence.facts,
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(number(value))}</td></tr>\n'
        for name, value in facts.items()
    )
    return f'<div class="scroll"><table class="facts"><tbody>\n{rows}</tbody></table></div>'


def _histogram(png: bytes | None) -> str:
    if png is None:
        return ""
    return (
        '<section><h2>The scores</h2><figure class="picture"><div class="scroll">'
        f'<img src="{_data_url(png)}" width="1350" height="630" alt="Histogram of the scores">'
        "</div><figcaption>Every training image is in this picture. The scale of counts is logarithmic, so that a "
        "few images far to the right stay visible.</figcaption></figure></section>"
    )


def _card(exhibit: Exhibit, verdict: Verdict, evidence: Evidence) -> str:
    kept = bool(verdict.keep[exhibit.position])
    fate = "kept" if kept else "removed"
    names = ["image", *(f"what {name} changed" for name in evidence.variants)]
    pictures = "".join(
        f'<img src="{_data_url(_tile_png(tile))}" alt="{escape(name)}" title="{escape(name)}">'
        for tile, name in zip(exhibit.tiles, names, strict=False)
    )
    return (
        f'<figure class="card {fate}"><div class="tiles">{pictures}</div><figcaption>'
        f'<span class="who"><b>#{exhibit.position}</b> {_label(verdict, evidence, exhibit.position)}</span>'
        f'<span class="score">{score(float(verdict.scores[exhibit.position]))}</span>'
        f'<span class="fate">{fate}</span></figcaption></figure>\n'
    )


def _images(groups: list[Group], exhibits: list[Exhibit], verdict: Verdict, evidence: Evidence) -> str:
    if not exhibits:
        return ""
    variants = len(exhibits[0].tiles) - 1
    bright = f", brightened {exhibits[0].factor} times" if exhibits[0].factor > 1 else ""
    how = f" Beside each image: what {_listed(evidence.variants[:variants])} changed in it{bright}."
    shown = {exhibit.position: exhibit for exhibit in exhibits}
    blocks = ""
    for group in groups:
        cards = "".join(_card(shown[position], verdict, evidence) for position in group.positions)
        blocks += f'<h3>{escape(group.heading)}</h3><div class="cards" style="--tiles:{variants + 1}">\n{cards}</div>'
    note = f"<p>Number, label and score stand below.{escape(how) if variants else ''}</p>"
    return f"<section><h2>The images</h2>{note}{blocks}</section>"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _classes(rows: list[ClassRow], evidence: Evidence) -> str:
    if not rows:
        return ""
    cells = [
        [
            escape(evidence.class_name(row.label)),
            count(row.images),
            count(row.removed),
            f'<span class="bar" style="--share:{100 * row.removed / row.images:.2f}%"></span>'
            f"{percent(row.removed, row.images)}",
            score(row.median),
        ]
        for row in rows[:_CLASS_ROWS]
    ]
    table = _table(["class", "images", "removed", "share removed", "median score"], cells, "classes", range(1, 5))
    left = rows[_CLASS_ROWS:]
    removed = sum(row.removed for row in left)
    more = f"<p>{count(len(left), 'more class')} with {count(removed, 'removed image')}.</p>" if left else ""
    return f"<section><h2>The classes</h2>{table}{more}</section>"


def _given(evidence: Evidence) -> str:
    """Build the sections of the evidence: its tables, then its pictures."""
    return "".join(
        f"<section><h2>{escape(title)}</h2>{_given_table(head, rows)}</section>\n"
        for title, (head, rows) in evidence.tables.items()
    ) + "".join(
        f'<section><h2>{escape(title)}</h2><figure class="picture"><div class="scroll">'
        f'<img src="{_data_url(png)}" alt="{escape(title)}"></div></figure></section>\n'
        for title, png in evidence.figures.items()
    )


def _given_table(head: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    columns = range(len(head))
    numbers = [column for column in columns if rows and not any(isinstance(row[column], str) for row in rows)]
    cells = [[escape(number(cell)) for cell in row] for row in rows[:_TABLE_ROWS]]
    left = len(rows) - len(cells)
    more = f"<p>{count(left, 'more row')}.</p>" if left else ""
    return _table([escape(name) for name in head], cells, numbers=numbers) + more


def _removed(verdict: Verdict, evidence: Evidence) -> str:
    removed = verdict.removed
    if len(removed) == 0:
        return ""
    rows = [
        [str(position), _label(verdict, evidence, position), score(float(verdict.scores[position]))]
        for position in removed[:_REMOVED_ROWS].tolist()
    ]
    title = "The removed images" if len(rows) == len(removed) else f"The first {len(rows)} removed images"
    table = _table(["position in the dataset", "class", "score"], rows, numbers=[2])
    return f'<section><h2>{title}</h2><p>Most suspicious first.</p><div class="tall">{table}</div></section>'


def page(
    verdict: Verdict,
    *,
    method: str,
    evidence: Evidence,
    summary: Summary,
    rows: list[ClassRow],
    groups: list[Group],
    exhibits: list[Exhibit],
    histogram: bytes | None,
    note: str = "",
) -> str:
    """Build the page: plain sentences, facts, pictures, classes, tables and pictures of the evidence, removed images.

    The page holds everything that it shows and loads nothing. Its size is bounded for any ``N``: 24 images, 30
    classes, 100 removed images, 100 rows of each further table.

    Args:
        verdict: The verdict, ``N`` samples.
        method: Name of the defence.
        evidence: Names and facts, further tables and pictures.
        summary: The sentences, from :func:`~lightning_backdoor.report.sentences.summarize`.
        rows: The table of classes.
        groups: Headings and positions of the images.
        exhibits: The images themselves, empty if there are none.
        histogram: A PNG picture, or ``None``.
        note: A remark on what is missing.
    """
    title = escape(f"{method}: {summary.headline}")
    remark = f'<p class="note">{_prose(note)}</p>' if note else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header><p class="method">{escape(method)} report</p><h1>{escape(summary.headline)}</h1></header>
{_summary(summary)}
{remark}
{_histogram(histogram)}
{_images(groups, exhibits, verdict, evidence)}
{_classes(rows, evidence)}
{_given(evidence)}
{_removed(verdict, evidence)}
<section><h2>The facts</h2>{_facts(verdict, method, evidence)}</section>
<footer><p>The verdict on every training image: <a href="verdict.csv">verdict.csv</a></p></footer>
</main>
</body>
</html>
"""
