"""How the figures of the benchmark are drawn. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from typing import Any

INK, EDGE = "#22262b", "#8a9099"


@contextmanager
def own_style() -> Iterator[None]:
    """Draw with matplotlib's defaults, whatever style the user has set."""
    ours: dict[str, Any] = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": EDGE}
    with matplotlib.style.context(["default", ours]):
        yield


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, outside pyplot."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure
