"""One self-contained HTML page to read."""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from lightning_backdoor.detection.diagnosis import undiagnosed
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.explanation import (
    approval,
    figure_row,
    heading,
    labels_sentence,
    model_of,
    size_sentence,
    suggestions,
    trigger_sentence,
)
from lightning_backdoor.report.portraits import PICTURED, Common, Portrait
from lightning_backdoor.report.review import REVIEWED, controls, file_link, policy, reviewable, script
from lightning_backdoor.report.sentences import Summary, count, listed, number, percent, score
from lightning_backdoor.report.style import CSS
from lightning_backdoor.report.table import ClassRow
from lightning_backdoor.report.tiles import Exhibit, Group
from lightning_backdoor.verdict import Finding, Verdict

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


def _table(
    head: list[str],
    rows: list[list[str]],
    kind: str = "",
    numbers: Collection[int] = (),
    traits: Sequence[str] | None = None,
) -> str:
    """Build a table of cells that are HTML already.

    ``numbers`` are the columns that are aligned to the right, ``traits`` further attributes of the rows.
    """
    starts = ["<tr>"] * len(rows) if traits is None else [f"<tr {trait}>" for trait in traits]
    marks = [' class="number"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{mark}>{cell}</th>' for cell, mark in zip(head, marks, strict=True))
    body = "".join(
        start + "".join(f"<td{mark}>{cell}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>\n"
        for start, row in zip(starts, rows, strict=True)
    )
    table = f'<table class="{kind}"><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


@dataclass(frozen=True)
class _Shown:
    """What the sections of a page have in common.

    Args:
        verdict: The verdict.
        evidence: Names and facts.
        folder: Where the page will be.
        markable: Positions that can be marked as fine.
        findings: Index of the finding of every sample, -1 where it is in none, long ``(N,)``.
        suggested: Label that is suggested for every sample, -1 where there is none, long ``(N,)``.
    """

    verdict: Verdict
    evidence: Evidence
    folder: Path
    markable: frozenset[int]
    findings: Tensor
    suggested: Tensor

    def label(self, position: int) -> str:
        """The name of the label of a sample, as HTML."""
        labels = self.verdict.labels
        return "" if labels is None else escape(self.evidence.class_name(int(labels[position])))

    def suggestion(self, position: int) -> str:
        """An arrow and the label that is suggested for a sample, if it is another one than its own."""
        label = int(self.suggested[position])
        known = label >= 0 and (self.verdict.labels is None or label != int(self.verdict.labels[position]))
        return f" → {escape(self.evidence.class_name(label))}" if known else ""

    def fate(self, position: int) -> str:
        """Whether a sample is kept."""
        return "kept" if bool(self.verdict.keep[position]) else "removed"

    def traits(self, position: int) -> str:
        """The attributes by which a sample is filtered."""
        finding, labels = int(self.findings[position]), self.verdict.labels
        label = "" if labels is None else f' data-label="{int(labels[position])}"'
        return f'data-finding="{"none" if finding < 0 else finding}"{label} data-keep="{self.fate(position)}"'

    def box(self, position: int) -> str:
        """A box to mark a sample as fine."""
        if position not in self.markable:
            return ""
        return (
            f'<label class="mark js"><input type="checkbox" data-position="{position}" '
            f'aria-label="image {position} is fine">fine</label>'
        )

    def file(self, position: int) -> str:
        """A link to the file of a sample."""
        return "" if self.verdict.paths is None else file_link(self.verdict.paths[position], self.folder)


def _summary(summary: Summary) -> str:
    parts = {
        "What was found": summary.found,
        "What was done": summary.done,
        "What to do next": summary.then,
        "What was looked at": summary.looked,
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


def _card(position: int, tiles: Sequence[Tensor], names: Sequence[str], shown: _Shown) -> str:
    """A sample with its tiles, uint8 ``(H, W, 3)`` each, and what they are."""
    fate = shown.fate(position)
    pictures = "".join(
        f'<img src="{_data_url(_tile_png(tile))}" alt="{escape(name)}" title="{escape(name)}">'
        for tile, name in zip(tiles, names, strict=False)
    )
    return (
        f'<figure class="card {fate}" {shown.traits(position)}><div class="tiles">{pictures}</div><figcaption>'
        f'<span class="who"><b>#{position}</b> {shown.label(position)}{shown.suggestion(position)}</span>'
        f'<span class="score">{score(float(shown.verdict.scores[position]))}</span>'
        f'<span class="fate">{fate}</span>{shown.file(position)}{shown.box(position)}</figcaption></figure>\n'
    )


def _cards(title: str, cards: Sequence[str], tiles: int = 1) -> str:
    inner = "".join(cards)
    return f'<div data-block><h3>{escape(title)}</h3><div class="cards" style="--tiles:{tiles}">\n{inner}</div></div>'


def _images(groups: list[Group], exhibits: list[Exhibit], shown: _Shown) -> str:
    if not exhibits:
        return ""
    evidence = shown.evidence
    variants = len(exhibits[0].tiles) - 1
    bright = f", brightened {exhibits[0].factor} times" if exhibits[0].factor > 1 else ""
    how = f" Beside each image: what {listed(evidence.variants[:variants])} changed in it{bright}."
    names = ["image", *(f"what {name} changed" for name in evidence.variants)]
    tiles = {exhibit.position: exhibit.tiles for exhibit in exhibits}
    blocks = "".join(
        _cards(
            group.heading,
            [_card(position, list(tiles[position]), names, shown) for position in group.positions],
            variants + 1,
        )
        for group in groups
    )
    note = f"<p>Number, label and score stand below.{escape(how) if variants else ''}</p>"
    return f"<section><h2>The images</h2>{note}{blocks}</section>"


def _findings(portraits: list[Portrait], pixels: dict[int, Tensor], shown: _Shown) -> str:
    """Build one section for each finding, after a list of them if there are several."""
    verdict, evidence = shown.verdict, shown.evidence
    if not verdict.findings:
        return ""
    sections = [
        _finding(index, finding, portraits[index] if index < len(portraits) else None, pixels, shown)
        for index, finding in enumerate(verdict.findings)
    ]
    if len(sections) == 1:
        return sections[0]
    rows = [
        [
            f'<a href="#finding-{index}">finding {index}</a>',
            escape(evidence.class_name(finding.label)),
            count(len(finding)),
            "not known yet" if evidence.diagnosis_follows and undiagnosed([finding]) else finding.diagnosis,
            "" if finding.estimated_asr is None else percent(finding.estimated_asr),
            "" if finding.control_asr is None else percent(finding.control_asr),
        ]
        for index, finding in enumerate(verdict.findings)
    ]
    head = ["", "label", "images", "diagnosis", "estimated ASR", "control"]
    table = _table(head, rows, "findings", [2, 4, 5])
    return f"<section><h2>The findings</h2>{table}</section>\n" + "\n".join(sections)


def _finding(index: int, finding: Finding, portrait: Portrait | None, pixels: dict[int, Tensor], shown: _Shown) -> str:
    verdict, evidence = shown.verdict, shown.evidence
    sentences = {
        "How many": size_sentence(finding, verdict),
        "Labels": labels_sentence(finding, evidence),
        "Trigger": trigger_sentence(finding, evidence),
    }
    told = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in sentences.items())
    pictures = ""
    if portrait is not None:
        size = len(portrait.members)
        some = (
            f"{size:,} of its {len(finding):,} images, most suspicious first" if size < len(finding) else "Its images"
        )
        pictures = _common(portrait.common)
        pictures += _cards(some, [_card(place, [pixels[place]], ["image"], shown) for place in portrait.members])
        if portrait.ordinary:
            beside = f"Beside them: ordinary images of “{evidence.class_name(finding.label)}”"
            pictures += _cards(beside, [_card(p, [pixels[p]], ["image"], shown) for p in portrait.ordinary])
    elif index >= PICTURED:
        pictures = f"<p>Pictures are shown of the first {PICTURED} findings.</p>"
    return (
        f'<section id="finding-{index}" class="finding" data-section="{index}">'
        f"<h2>Finding {index}: {escape(heading(finding, evidence))}</h2><dl>{told}</dl>{pictures}"
        f"{_approve(index, finding, shown)}{_suggested(finding, evidence)}{_gate(finding, evidence)}</section>"
    )


def _common(common: Common | None) -> str:
    if common is None:
        return ""
    group, ordinary = common.counts
    names = [
        f"mean of {count(group, 'image')} of the finding",
        f"mean of {count(ordinary, 'ordinary image')} of the label",
        "their difference (gray: none)" + f", stretched {common.factor:.1f} times" * (common.factor > 1),
    ]
    pictures = "".join(
        f'<figure><img src="{_data_url(_tile_png(tile))}" alt="{name}"><figcaption>{name}</figcaption></figure>'
        for tile, name in zip(common.tiles, names, strict=True)
    )
    return f'<h3>What they have in common</h3><div class="common">{pictures}</div>'


def _suggested(finding: Finding, evidence: Evidence) -> str:
    rows = [
        [
            "none" if label < 0 else escape(evidence.class_name(label)) + (" (its own)" * (label == finding.label)),
            count(images),
            "" if sure is None else percent(sure),
        ]
        for label, images, sure in suggestions(finding)
    ]
    if not rows:
        return ""
    table = _table(["suggested label", "images", "mean probability"], rows[:_CLASS_ROWS], "narrow", [1, 2])
    more = f"<p>{count(len(rows) - _CLASS_ROWS, 'more label')}.</p>" if len(rows) > _CLASS_ROWS else ""
    return f"<h3>The labels that {model_of(finding)} gives them</h3>{table}{more}"


def _gate(finding: Finding, evidence: Evidence) -> str:
    rows = [[escape(cell) for cell in figure_row(figure)] for figure in finding.figures]
    rate = ""
    if evidence.false_alarm_rate is not None:
        rate = (
            f" By its bounds, noise in clean data is a finding in {percent(evidence.false_alarm_rate)} of trainings at "
            "most (<code>false_alarm_rate</code>). A clean kind of image is not noise."
        )
    table = _table(["measured", "value", "bound"], rows, "figures", [1]) if rows else ""
    by = f" It was found by {escape(listed(finding.detectors))}." if finding.detectors else ""
    return (
        f"<details><summary>Why it was found: the figures of the test</summary><p>It passed the test "
        f"<code>{escape(finding.gate)}</code>.{by}{rate}</p>{table}</details>"
    )


def _approve(index: int, finding: Finding, shown: _Shown) -> str:
    line = escape(approval(finding, index, shown.evidence.callback))
    marked = escape(f'{shown.evidence.callback}(approved="{REVIEWED}")' if shown.evidence.callback else REVIEWED)
    box = ""
    if shown.markable.issuperset(finding.positions[:1].tolist()):
        box = (
            f'<p class="js"><label class="mark whole"><input type="checkbox" data-whole="{index}">'
            f"All {count(len(finding), 'image')} of this finding are fine</label></p>"
        )
    return (
        f"<h3>If they are fine</h3>{box}<p>Train again with this line, and they are never removed:</p>"
        f"<pre><code>{line}</code></pre>"
        f'<p class="js">Or mark the images that are fine, download <code>{REVIEWED}</code>, and pass '
        f"<code>{marked}</code>.</p>"
    )


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


def _removed(shown: _Shown) -> str:
    verdict = shown.verdict
    removed = verdict.removed
    if len(removed) == 0:
        return ""
    named, marked = verdict.paths is not None, bool(shown.markable)
    head = ["position in the dataset", "class", "score", *["file"] * named, *[""] * marked]
    rows = [
        [
            str(position),
            shown.label(position),
            score(float(verdict.scores[position])),
            *[shown.file(position)] * named,
            *[shown.box(position)] * marked,
        ]
        for position in removed[:_REMOVED_ROWS].tolist()
    ]
    traits = [shown.traits(position) for position in removed[:_REMOVED_ROWS].tolist()]
    title = "The removed images" if len(rows) == len(removed) else f"The first {len(rows)} removed images"
    table = _table(head, rows, numbers=[2], traits=traits)
    return f'<section data-block><h2>{title}</h2><p>Most suspicious first.</p><div class="tall">{table}</div></section>'


def page(
    verdict: Verdict,
    *,
    method: str,
    evidence: Evidence,
    summary: Summary,
    rows: list[ClassRow],
    groups: list[Group],
    exhibits: list[Exhibit],
    portraits: list[Portrait],
    pixels: dict[int, Tensor],
    histogram: bytes | None,
    folder: Path,
    note: str = "",
) -> str:
    """Build the page: plain sentences, findings, scores, pictures, classes, tables of the evidence, removed images.

    The page holds everything that it shows and loads nothing. Its size is bounded for any ``N``: some 350 images, 30
    classes, 100 removed images, 100 rows of each further table, and the rows of 50,000 samples to download.

    Args:
        verdict: The verdict, ``N`` samples.
        method: Name of the defence.
        evidence: Names and facts, further tables and pictures.
        summary: The sentences, from :func:`~lightning_backdoor.report.sentences.summarize`.
        rows: The table of classes.
        groups: Headings and positions of the images.
        exhibits: The images themselves, empty if there are none.
        portraits: Positions of the images of the first findings, empty if there are none.
        pixels: These images, uint8 ``(H, W, 3)``, by position.
        histogram: A PNG picture, or ``None``.
        folder: Where the page will be: links to files start there.
        note: A remark on what is missing.
    """
    title = escape(f"{method}: {summary.headline}")
    remark = f'<p class="note">{_prose(note)}</p>' if note else ""
    removed = verdict.removed[:_REMOVED_ROWS]
    pictures = torch.tensor([exhibit.position for exhibit in exhibits], dtype=torch.long)
    nothing = not len(verdict.removed) and not verdict.findings
    positions = removed[:0] if nothing else reviewable(verdict, torch.cat([removed, pictures]))
    shown = _Shown(
        verdict, evidence, folder, frozenset(positions.tolist()), verdict.finding_indices, verdict.suggested_labels
    )
    filters, bar, code = "", "", ""
    if len(positions):
        filters, bar = controls(verdict, positions, evidence)
        code = script(verdict, positions)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy(bool(len(positions)))}">
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
{filters}
{_findings(portraits, pixels, shown)}
{_histogram(histogram)}
{_images(groups, exhibits, shown)}
{_classes(rows, evidence)}
{_given(evidence)}
{_removed(shown)}
<section><h2>The facts</h2>{_facts(verdict, method, evidence)}</section>
<footer><p>The verdict on every training image: <a href="verdict.csv">verdict.csv</a></p></footer>
</main>
{bar}
{code}</body>
</html>
"""
