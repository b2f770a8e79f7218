"""Marking images as fine on the page, and the table with the marks to download: data, controls, script."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.table import csv_columns, csv_rows
from lightning_backdoor.verdict import Verdict

__all__ = ["REVIEWED", "controls", "file_link", "policy", "reviewable", "script"]

REVIEWED = "reviewed.csv"
MOST = 50_000  # samples that the page can mark; their rows are part of it, some 60 bytes each

# Boxes of single images have `data-position`, boxes of whole findings `data-whole`. What can be filtered has
# `data-finding` (an index, or "none"), `data-label` and `data-keep`; sections of findings have `data-section`.
SCRIPT = """
"use strict";
const table = JSON.parse(document.getElementById("rows").textContent);
const column = Object.fromEntries(table.columns.map((name, place) => [name, place]));
const fine = new Set(table.rows.filter((row) => row[column.approved]).map((row) => row[0]));
const members = new Map();
for (const row of table.rows) {
  const finding = String(row[column.finding]);
  if (finding !== "") members.set(finding, [...(members.get(finding) || []), row[0]]);
}
const all = (selector) => document.querySelectorAll(selector);
let saved = true;

function show() {
  for (const box of all("input[data-position]")) {
    box.checked = fine.has(Number(box.dataset.position));
    box.closest("[data-keep]").classList.toggle("fine", box.checked);
  }
  for (const box of all("input[data-whole]")) {
    const positions = members.get(box.dataset.whole) || [];
    const marked = positions.filter((position) => fine.has(position)).length;
    box.checked = marked === positions.length;
    box.indeterminate = marked > 0 && marked < positions.length;
  }
  document.getElementById("marked").textContent = fine.size.toLocaleString("en") + " marked as fine";
  document.getElementById("nothing").hidden = fine.size === 0;
}

function mark(positions, yes) {
  for (const position of positions) yes ? fine.add(position) : fine.delete(position);
  saved = false;
  show();
}

function filter() {
  const chosen = ["finding", "label", "keep"].map((name) => [name, document.getElementById("by-" + name).value]);
  const fits = (element) => chosen.every(([name, value]) => value === "" || element.dataset[name] === value);
  let shown = 0;
  for (const element of all("[data-keep]")) {
    element.hidden = !fits(element);
    if (!element.hidden && element.matches("figure")) shown += 1;
  }
  for (const block of all("[data-block]")) block.hidden = !block.querySelector("[data-keep]:not([hidden])");
  const finding = document.getElementById("by-finding").value;
  for (const section of all("[data-section]")) section.hidden = finding !== "" && section.dataset.section !== finding;
  document.getElementById("shown").textContent = shown === 1 ? "1 picture shown" : shown + " pictures shown";
}

function cell(value) {
  const text = value === true ? "True" : value === false ? "False" : String(value);
  return /[",\\r\\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function download() {
  const lines = table.rows.map((row) =>
    row.map((value, place) => cell(place === column.approved ? fine.has(row[0]) : value)).join(","));
  const text = [table.columns.map(cell).join(","), ...lines].join("\\n") + "\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "reviewed.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  saved = true;
}

document.addEventListener("change", (event) => {
  const box = event.target;
  if (box.dataset.position !== undefined) mark([Number(box.dataset.position)], box.checked);
  else if (box.dataset.whole !== undefined) mark(members.get(box.dataset.whole) || [], box.checked);
  else filter();
});
document.getElementById("download").addEventListener("click", download);
document.getElementById("nothing").addEventListener("click", () => mark([...fine], false));
addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
document.documentElement.classList.add("reviewing");
show();
filter();
"""


def policy(reviewing: bool) -> str:
    """The content security policy of the page: nothing is loaded, and no other script runs than this one."""
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if reviewing else "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"


def reviewable(verdict: Verdict, shown: Tensor) -> Tensor:
    """Positions that the page can mark, in rising order: those that it shows and all of the findings.

    Empty if there are none, or more than fit on a page.

    Args:
        verdict: The verdict.
        shown: Positions of images and rows on the page.
    """
    found = sum(map(len, verdict.findings))
    if found + len(shown) > MOST:
        return torch.zeros(0, dtype=torch.long)
    positions: Tensor = torch.unique(torch.cat([shown.long(), *(finding.positions for finding in verdict.findings)]))
    return positions


def script(verdict: Verdict, positions: Tensor) -> str:
    """The rows of these samples as data, and the script."""
    rows = {"columns": csv_columns(verdict), "rows": list(csv_rows(verdict, positions))}
    data = json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="rows">{data}</script>\n<script>{SCRIPT}</script>\n'


def controls(verdict: Verdict, positions: Tensor, evidence: Evidence) -> tuple[str, str]:
    """The filters, and the bar with the download at the bottom of the window."""
    labels = [] if verdict.labels is None else torch.unique(verdict.labels[positions]).tolist()
    findings = [(str(index), f"finding {index}") for index in range(len(verdict.findings))]
    choices = {
        "finding": [("", "all"), *findings, ("none", "in none")],
        "label": [("", "all"), *((str(label), evidence.class_name(label)) for label in labels)],
        "keep": [("", "all"), ("removed", "removed"), ("kept", "kept")],
    }
    names = {"finding": "Finding", "label": "Label", "keep": "Removed or kept"}
    selects = "".join(
        f'<label>{names[key]} <select id="by-{key}">'
        + "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
        + "</select></label>\n"
        for key, options in choices.items()
    )
    filters = (
        '<form class="filters js" aria-label="Filter"><p>Show images by</p>\n'
        f'{selects}<output id="shown"></output></form>'
    )
    bar = (
        '<div class="bar-below js" role="region" aria-label="Review"><output id="marked"></output>'
        '<button type="button" id="nothing">Clear</button>'
        f'<button type="button" id="download" class="main">Download {REVIEWED}</button></div>'
    )
    return filters, bar


def file_link(path: str, folder: Path, text: str = "") -> str:
    """A link to a file if it is there, else its name; relative to the folder of the page if the path is relative.

    Args:
        path: As the dataset names it; empty if there is none.
        folder: Where the page will be.
        text: Shown; by default the name of the file.
    """
    if not path:
        return ""
    name = escape(text or os.path.basename(path) or path)
    try:
        file = Path(path)
        if not file.is_file():
            return f'<span class="file" title="{escape(path)}">{name}</span>'
        if file.is_absolute():
            address = file.as_uri()
        else:
            root = Path(os.path.abspath(os.sep))
            relative = (root / os.path.relpath(file.absolute(), folder)).as_uri().removeprefix(root.as_uri())
            address = relative if relative.startswith("..") else f"./{relative}"
    except (OSError, ValueError):  # a name that no file can have; another drive
        return f'<span class="file" title="{escape(path)}">{name}</span>'
    return f'<a class="file" href="{escape(address)}" title="{escape(path)}" target="_blank" rel="noopener">{name}</a>'
