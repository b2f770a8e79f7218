"""Pictures of a verdict as PNG bytes. Needs matplotlib, and leaves the user's matplotlib as it was."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.sentences import number, score
from lightning_backdoor.report.tiles import Exhibit
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["blank_figure", "contact_sheet", "histogram", "own_style", "png_bytes"]

DPI = 150
_KEPT, _REMOVED, _INK, _SOFT = "#2f78b7", "#c24a15", "#22262b", "#4a5058"
_FRAME, _FRAME_PIXELS = (138, 144, 153), 2
_FLOOR = 0.1  # a logarithmic axis has no zero: empty bins end below the picture
_BINS = 90
_TILES_PER_ROW, _CELLS_PER_ROW = 9, 6


@contextmanager
def own_style() -> Iterator[None]:
    """Draw with matplotlib's defaults, not with the user's style, and without the state of pyplot."""
    import matplotlib.style  # noqa: PLC0415  (an extra, loaded when used)

    ours: dict[str, Any] = {"font.size": 11, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#8a9099"}
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # class names in any script
        yield


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that is not registered with pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (an extra, loaded when used)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Encode a figure at ``DPI`` pixels per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _window(scores: NDArray[np.float64], threshold: float) -> tuple[float, float]:
    """Return the part of the score axis worth drawing: the bulk with room around it, and a threshold near it."""
    finite = scores[np.isfinite(scores)]
    if len(finite) == 0:
        return 0.0, 1.0
    lowest, highest = float(finite.min()), float(finite.max())
    low, high = (float(edge) for edge in np.quantile(finite, [0.005, 0.995]))
    if high > low:
        room = 4 * (high - low)
        inside = finite[(finite >= low - room) & (finite <= high + room)]
        lowest, highest = float(inside.min()), float(inside.max())
        if lowest - room <= threshold <= highest + room:
            lowest, highest = min(lowest, threshold), max(highest, threshold)
    margin = 0.03 * (highest - lowest)
    if highest - lowest <= 1e-9 * max(abs(highest), abs(lowest)):
        margin = 0.05 * abs(highest) or 0.5
    return lowest - margin, highest + margin


def histogram(verdict: Verdict) -> bytes:
    """Draw how the scores of kept and removed images are distributed, on a logarithmic scale of counts.

    Scores far outside the bulk are counted in the outermost bins, and the picture gives their number.

    Args:
        verdict: The verdict, ``N`` samples.

    Returns:
        A PNG picture.
    """
    scores, keep = verdict.scores.double().numpy(), verdict.keep.numpy()
    low, high = _window(scores, verdict.threshold)
    edges = np.linspace(low, high, _BINS + 1)
    with own_style():
        figure = blank_figure(9, 4.2)
        axes = figure.add_axes((0.12, 0.14, 0.85, 0.75))
        tallest = 1
        for mask, color, name in ((keep, _KEPT, "kept"), (~keep, _REMOVED, "removed")):
            if mask.any():
                counts, _ = np.histogram(np.clip(scores[mask & ~np.isnan(scores)], low, high), bins=edges)
                tallest = max(tallest, int(counts.max()))
                bars = np.maximum(counts, _FLOOR)
                axes.stairs(
                    bars, edges, baseline=_FLOOR, fill=True, color=color, alpha=0.85, label=f"{name} ({mask.sum():,})"
                )
        _mark_threshold(axes, verdict.threshold, low, high)
        _mark_outside(axes, scores, low, high)
        axes.set(yscale="log", ylim=(0.7, max(2.5 * tallest, 12)), xlim=(low, high))
        axes.set_xlabel("score (larger is more suspicious)")
        axes.set_ylabel("images, log scale")
        axes.yaxis.set_label_coords(-0.105, 0.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_minor_formatter(lambda _value, _: "")
        axes.grid(axis="y", color="#d9dde2", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.04), ncols=3, frameon=False, borderaxespad=0)
        return png_bytes(figure)


def _mark_threshold(axes: Any, threshold: float, low: float, high: float) -> None:
    """Draw the threshold, or give its value in the legend if it is not on the axis."""
    if low <= threshold <= high:
        name = f"threshold {number(threshold)}"
        axes.axvline(threshold, color=_INK, linewidth=1.4, linestyle=(0, (4, 3)), label=name)
        return
    beyond = f"threshold {number(threshold)}, outside this range"
    axes.plot([], [], " ", label="no threshold" if np.isinf(threshold) else beyond)


def _mark_outside(axes: Any, scores: NDArray[np.float64], low: float, high: float) -> None:
    """Write below the axis how many scores beyond it the outermost bars hold, and how many are not numbers."""
    above, below, missing = int((scores > high).sum()), int((scores < low).sum()), int(np.isnan(scores).sum())
    right = [f"{above:,} higher, in the last bar"] if above else []
    right += [f"{missing:,} not a number"] if missing else []
    style = {"transform": axes.transAxes, "va": "top", "fontsize": 9.5, "color": _SOFT}
    axes.text(1, -0.1, "; ".join(right), ha="right", **style)
    axes.text(0, -0.1, f"{below:,} lower, in the first bar" if below else "", ha="left", **style)


def contact_sheet(exhibits: list[Exhibit], verdict: Verdict, evidence: Evidence) -> bytes:
    """Draw images beside their amplified denoised differences, with position, class and score, kept or removed.

    Args:
        exhibits: The images, from :func:`~lightning_backdoor.report.tiles.collect`; at least one.
        verdict: The verdict that they belong to.
        evidence: Names of the classes and of the denoised variants.

    Returns:
        A PNG picture; small images are enlarged without smoothing.
    """
    tiles, height, width = exhibits[0].tiles.shape[:3]
    columns = max(1, min(_TILES_PER_ROW // tiles, _CELLS_PER_ROW))
    rows = -(-len(exhibits) // columns)
    ratio = min(max(height / width, 0.25), 3.0)
    cell_width, text, header = 12.4 / columns, 0.5, 0.45 if tiles > 1 else 0.15
    cell_height = cell_width / tiles * ratio + text
    names = ["image", *(f"{name} ×{exhibits[0].factor}" for name in evidence.variants)][:tiles]
    with own_style():
        figure = blank_figure(cell_width * columns + 0.1, cell_height * rows + header)
        total_width, total_height = figure.get_size_inches()
        boxes: list[tuple[Any, tuple[float, float, float, float]]] = []
        for number_, exhibit in enumerate(exhibits):
            row, column = divmod(number_, columns)
            left, top = 0.15 + column * cell_width, total_height - header - row * cell_height
            tile_width = (cell_width - 0.25) / tiles
            for slot, tile in enumerate(exhibit.tiles):
                x, across = left + slot * tile_width, tile_width - 0.05
                boxes.append((tile.numpy(), (x, total_height - top + text - 0.1, across, cell_height - text)))
                if row == 0 and tiles > 1:
                    figure.text(
                        (x + across / 2) / total_width,
                        1 - 0.16 / total_height,
                        names[slot],
                        ha="center",
                        va="top",
                        fontsize=8.5,
                        color=_SOFT,
                        parse_math=False,
                    )
            _caption(figure, (left, left + cell_width, top), exhibit.position, verdict, evidence)
        return _with_pictures(figure, boxes)


def _with_pictures(figure: Figure, boxes: list[tuple[NDArray[np.uint8], tuple[float, float, float, float]]]) -> bytes:
    """Encode a figure with pictures, each at the top of a box, enlarged without smoothing and framed.

    They are put into the pixels of the drawn figure: axes for each of them would take most of the time of a report.

    Args:
        figure: With everything else that is to be drawn.
        boxes: Pictures ``(h, w, 3)``, each with left, top, width and height of its box in inches, from the left and
            from the top.
    """
    from PIL import Image  # noqa: PLC0415  (comes with matplotlib)

    figure.set_dpi(DPI)
    canvas: Any = figure.canvas
    canvas.draw()
    drawn, line = np.array(canvas.buffer_rgba())[..., :3], _FRAME_PIXELS
    for picture, box in boxes:
        left, top, width, height = (side * DPI for side in box)
        scale = min(width / picture.shape[1], height / picture.shape[0])
        down, across = (max(round(scale * side), 1) for side in picture.shape[:2])
        rows, columns = np.arange(down) * picture.shape[0] // down, np.arange(across) * picture.shape[1] // across
        x, y = round(left + (width - across) / 2), round(top)
        drawn[y - line : y + down + line, x - line : x + across + line] = _FRAME
        drawn[y : y + down, x : x + across] = picture[rows][:, columns]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(drawn)).save(file, format="png")
    return file.getvalue()


def _caption(
    figure: Figure, box: tuple[float, float, float], position: int, verdict: Verdict, evidence: Evidence
) -> None:
    """Write position, class, score, kept or removed above a row of tiles; ``box`` is left, right and top in inches."""
    width, height = figure.get_size_inches()
    left, right, top = box
    kept = bool(verdict.keep[position])
    name = "" if verdict.labels is None else " ".join(evidence.class_name(int(verdict.labels[position])).split())
    room = int((right - left) / 0.1) - len(str(position)) - 3
    short = name if len(name) <= room else f"{name[: room - 1]}…"
    fate = f"{'kept' if kept else 'removed'}, score {score(float(verdict.scores[position]))}"
    x = left / width
    figure.text(
        x, (top - 0.02) / height, f"#{position}  {short}", va="top", fontsize=9.5, weight="bold", parse_math=False
    )
    figure.text(x, (top - 0.19) / height, fate, va="top", fontsize=9, color=_KEPT if kept else _REMOVED)
