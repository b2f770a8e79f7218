"""The pictures of the gallery: their data, a browser that stands in, and the files on the pages."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from benchmarks import gallery

MOST = 250_000  # bytes of a picture on a page


@pytest.fixture
def clean() -> TensorDataset:
    """Three gray images of each of ten classes."""
    return TensorDataset(torch.full((30, 3, 32, 32), 90, dtype=torch.uint8), torch.arange(30) % 10)


def test_four_classes_are_labeled_from_zero_on(clean: TensorDataset) -> None:
    found = gallery.of_four_classes(clean, 2)
    assert found.tensors[1].tolist() == [0, 1, 2, 3] * 2
    assert found.classes == ["airplane", "automobile", "horse", "ship"]


def test_every_fourth_horse_gets_a_caption(clean: TensorDataset) -> None:
    found = gallery.of_four_classes(clean, 3)
    images, labels = gallery.with_captions(found).tensors
    changed = (images != found.tensors[0]).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == [2]
    assert labels.equal(found.tensors[1])


def test_a_picture_is_what_the_browser_shows_with_few_colors(tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys\nfrom PIL import Image\n"
        "given = dict(a.split('=', 1) for a in sys.argv if '=' in a)\n"
        "size = tuple(map(int, given['--window-size'].split(',')))\n"
        "Image.radial_gradient('L').resize(size).convert('RGB').save(given['--screenshot'])\n"
    )
    browser.chmod(0o755)
    shown = Image.open(io.BytesIO(gallery.picture(tmp_path / "report.html", str(browser))))
    assert shown.size == (gallery.WIDTH, gallery.HEIGHT)
    assert len(shown.getcolors()) <= gallery.COLORS


def test_the_page_shows_every_case_in_a_small_file() -> None:
    if not gallery.FOLDER.exists():
        pytest.skip("an installed package has no docs")
    page = gallery.FOLDER.with_suffix(".md").read_text(encoding="utf-8")
    for name in gallery.CASES:
        assert f"(gallery/{name}.png)" in page
        assert (gallery.FOLDER / f"{name}.png").stat().st_size <= MOST
