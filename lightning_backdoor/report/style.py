"""The style sheet of the page: light and dark, wide and narrow."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
:root {
  --page: #fbfbfa; --ink: #22262b; --soft: #5a626c; --line: #dfe2e6; --panel: #ffffff; --code: #eef0f2;
  --kept: #21609a; --removed: #b0410f; --link: #1d5fa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181b; --ink: #e6e8ea; --soft: #a3abb5; --line: #33383e; --panel: #1e2125; --code: #2a2e34;
    --kept: #7db8ee; --removed: #ff9a66; --link: #8cbcf5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); line-height: 1.2; margin: 0 0 1.5rem; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 3rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; }
a { color: var(--link); }
code { background: var(--code); border-radius: 4px; padding: .1em .35em; font-size: .9em; overflow-wrap: anywhere; }
[hidden], html:not(.reviewing) .js { display: none !important; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.method { color: var(--soft); margin: 0 0 .25rem; font-size: .95rem; }
dl {
  display: grid; grid-template-columns: max-content minmax(0, 46rem); gap: .6rem 1.5rem; margin: 0;
  padding: 1.25rem 1.5rem; background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
}
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre {
  margin: .5rem 0; padding: .7rem .9rem; background: var(--code); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
pre code { padding: 0; }
.filters { display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; align-items: center; margin: 1.75rem 0 0; }
.filters label { max-width: 100%; } .filters p { margin: 0; color: var(--soft); }
.filters output { color: var(--soft); font-size: .9rem; }
select { max-width: 14rem; }
select, button {
  font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: .25rem .6rem;
}
button { cursor: pointer; } button.main { background: var(--link); border-color: var(--link); color: var(--page); }
.bar-below {
  position: sticky; bottom: 0; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  justify-content: flex-end; padding: .6rem 1.25rem; background: var(--panel); border-top: 1px solid var(--line);
}
.bar-below output { margin-right: auto; font-variant-numeric: tabular-nums; }
.mark { display: inline-flex; gap: .35rem; align-items: center; cursor: pointer; white-space: nowrap; }
.mark input { width: 1.05rem; height: 1.05rem; margin: 0; accent-color: var(--link); flex: none; }
.whole { white-space: normal; font-weight: 600; }
.fine { border-color: var(--link); box-shadow: inset 0 0 0 1px var(--link); } tr.fine { box-shadow: none; }
tr.fine td { background: var(--code); }
.common { display: grid; gap: .75rem; grid-template-columns: repeat(3, minmax(0, 11rem)); }
.common figure { margin: 0; }
.common img { width: 100%; display: block; image-rendering: pixelated; border-radius: 6px; }
.common img, .tiles img { outline: 1px solid var(--line); outline-offset: -1px; }
.common figcaption { font-size: .85rem; line-height: 1.35; color: var(--soft); margin-top: .3rem; }
details { margin: 1.5rem 0 0; } summary { cursor: pointer; font-weight: 600; }
.note { border-left: 3px solid var(--removed); padding: .25rem 0 .25rem .9rem; margin-top: 1.25rem; }
.scroll { overflow-x: auto; }
.picture {
  margin: 0; background: #ffffff; color: #4a5058; padding: .75rem; border: 1px solid var(--line); border-radius: 10px;
}
.picture img { display: block; width: 100%; min-width: 34rem; height: auto; }
.picture figcaption { font-size: .9rem; line-height: 1.45; padding: .25rem .4rem; }
.cards {
  display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 4rem + var(--tiles) * 4.7rem), 1fr));
}
.card {
  margin: 0; min-width: 0; padding: .55rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
}
.tiles { display: grid; grid-template-columns: repeat(var(--tiles), 1fr); gap: .3rem; }
.tiles img { width: 100%; height: auto; display: block; image-rendering: pixelated; border-radius: 3px; }
.card figcaption {
  display: flex; flex-wrap: wrap; gap: 0 .6rem; align-items: baseline;
  margin-top: .4rem; font-size: .85rem; line-height: 1.3;
}
.who { flex: 1 1 5.5rem; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.file { flex: 1 1 100%; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.score { font-variant-numeric: tabular-nums; }
.fate { font-weight: 600; color: var(--kept); } .removed .fate { color: var(--removed); }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; background: var(--page); }
.narrow { width: auto; min-width: min(100%, 28rem); }
.tall td, .tall th, .findings td { white-space: nowrap; } .figures td { overflow-wrap: normal; }
.facts { width: auto; min-width: min(100%, 28rem); }
.facts th { font-weight: 400; color: var(--soft); padding-right: 2rem; }
td.number, th.number { text-align: right; } .classes .number { white-space: nowrap; }
.bar { display: inline-block; width: 6rem; height: .55em; margin-right: .6rem; border-radius: 3px;
  background: linear-gradient(to right, var(--removed) var(--share), var(--line) var(--share)); }
.tall {
  max-height: 26rem; overflow-y: auto; border: 1px solid var(--line); border-radius: 10px; padding: 0 1rem .5rem;
}
.tall .scroll { overflow: visible; } .tall thead th { position: sticky; top: 0; }
footer { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: .1rem; padding: 1rem; } dd + dt { margin-top: .7rem; }
  .bar { width: 2.5rem; }
  .bar-below { padding: .5rem .75rem; gap: .5rem; font-size: .85rem; line-height: 1.25; flex-wrap: nowrap; }
  .bar-below button { padding: .4rem .5rem; white-space: nowrap; }
}
@media print { .bar-below, .filters { display: none; } .tall { max-height: none; }
  .card, .picture { break-inside: avoid; } }
"""
