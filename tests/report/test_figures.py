from __future__ import annotations

import io
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from lightning_backdoor.report.tiles import choose, collect
from lightning_backdoor.verdict import Verdict
from tests.report.helpers import evidence, verdict

pytest.importorskip("matplotlib")

from PIL import Image

from lightning_backdoor.report.figures import _window, contact_sheet, histogram

REMOVED = np.array([194, 74, 21])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def reddish(png: bytes) -> int:
    return int((np.abs(pixels(png) - REMOVED).sum(axis=2) < 90).sum())


def judged(scores: torch.Tensor, threshold: float) -> Verdict:
    return Verdict(scores=scores, keep=scores <= threshold, threshold=threshold, rule="r")


def test_removed_images_have_their_own_color():
    assert reddish(histogram(verdict(2_000, 500))) > 10_000
    assert reddish(histogram(verdict(2_000, 0))) == 0


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        (torch.full((50,), 3.0), float("inf")),
        (torch.zeros(50), 0.0),
        (torch.full((50,), 1e30), 5.0),
        (torch.tensor([7.0]), float("inf")),
        (torch.tensor([1.0, 1.0 + 1e-7]), 1.0),
        (torch.cat([torch.rand(500), torch.tensor([1e9, -1e9])]), 0.5),
        (torch.rand(500), 1e20),
        (torch.rand(500), float("-inf")),
        (torch.cat([torch.rand(50), torch.tensor([float("inf"), float("nan")])]), 0.9),
        (torch.full((5,), float("nan")), 0.9),
    ],
    ids=["constant", "zero", "huge", "one", "close", "outliers", "far", "all", "infinite", "nan"],
)
def test_awkward_scores_still_give_a_picture(scores, threshold):
    assert pixels(histogram(judged(scores, threshold))).shape == (630, 1350, 3)


def test_an_outlier_does_not_squeeze_the_bulk():
    scores = np.append(np.linspace(0, 1, 1_000), [1e9, np.inf])
    low, high = _window(scores, threshold=2.0)
    assert -0.2 < low < 0
    assert 2 < high < 2.2


def test_a_threshold_in_reach_is_on_the_axis_and_one_far_away_is_not():
    scores = np.linspace(0, 1, 1_000)
    assert _window(scores, threshold=3.0)[1] > 3
    assert _window(scores, threshold=1e6)[1] < 2


@pytest.mark.parametrize(("n", "channels", "variants"), [(1, 1, 2), (2, 3, 2), (60, 3, 2), (60, 1, 0), (7, 3, 0)])
def test_contact_sheet_shows_the_pixels(n, channels, variants):
    shown = evidence(channels) if variants else evidence(channels, denoised=None)
    decided = verdict(n, n // 2)
    exhibits = collect(choose(decided), shown)
    sheet = pixels(contact_sheet(exhibits, decided, shown))
    shades = np.array([65536, 256, 1])
    wanted = np.concatenate([exhibit.tiles.reshape(-1, 3).numpy() @ shades for exhibit in exhibits])
    assert np.isin(wanted, np.unique(sheet @ shades)).all()  # enlarged without smoothing: every pixel value is there


def test_class_names_cannot_break_the_sheet():
    shown = evidence(classes=["$\\frac{", "a" * 300, "two\nlines", "猫"])
    decided = verdict(40, 10)
    assert contact_sheet(collect(choose(decided), shown), decided, shown).startswith(b"\x89PNG")


def test_the_users_matplotlib_stays_as_it_was(tmp_path):
    script = f"""
        import matplotlib
        matplotlib.use("svg")
        matplotlib.rcParams["font.size"] = 31
        before = dict(matplotlib.rcParams)
        from lightning_backdoor.report import write_report  # torchmetrics imports pyplot on the way
        from tests.report.helpers import evidence, verdict
        from matplotlib import pyplot
        write_report({str(tmp_path)!r}, verdict(), method="UltraClean", evidence=evidence())
        assert not pyplot.get_fignums(), "a figure of ours is in the user's list"
        assert matplotlib.get_backend() == "svg"
        assert dict(matplotlib.rcParams) == before
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert (tmp_path / "histogram.png").exists()
