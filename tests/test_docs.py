"""The README and the pages in ``docs``: their code runs, figures are those of the results, what they name exists."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_backdoor import DSTCallback
from lightning_backdoor.callbacks.options import DETECTOR_DEFAULTS
from tests.contract.problem import WARNS, clean, fit, planted

pytestmark = WARNS
ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").exists():
    pytest.skip("an installed package has no docs", allow_module_level=True)

README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
FINE_TUNED = ROOT / "benchmarks" / "finetune.jsonl"
OWN_DEFENSE = ROOT / "docs" / "howto" / "write_your_own_defense.md"


def code_of(path: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


class Model(pl.LightningModule):
    """The reader's model: two layers on uint8 images (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(pl.LightningDataModule):
    """The reader's data."""

    def train_dataloader(self) -> Any:
        return DataLoader(images_of(96), batch_size=24, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(images_of(48), batch_size=24)


def images_of(n: int) -> TensorDataset:
    """Images of four classes that a small network tells apart."""
    labels = torch.arange(n) % 4
    noise = torch.randint(60, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n))
    return TensorDataset((noise + 45 * labels[:, None, None, None]).to(torch.uint8), labels)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What a reader has before the code of a page; a Trainer trains for two epochs at most, and prints nothing."""

    class Trainer(pl.Trainer):
        def __init__(self, *, max_epochs: int = 1, **settings: Any) -> None:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
            super().__init__(max_epochs=min(max_epochs, 2), **{**quiet, **settings})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take seconds; other tests draw them
    for defaults in (DETECTOR_DEFAULTS, DSTCallback.shared_defaults):
        monkeypatch.setitem(defaults, "detector_steps", 10)
    monkeypatch.setattr(pl, "Trainer", Trainer)
    torch.manual_seed(0)
    data = Data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield {
            "__name__": "page",
            "Trainer": Trainer,
            "model": Model(),
            "datamodule": data,
            "dataset": images_of(96),
            "test_dataset": images_of(48),
            "train_loader": data.train_dataloader(),
            "val_loader": data.val_dataloader(),
        }


@pytest.mark.parametrize(
    "path", [path for path in PAGES if code_of(path) and path != OWN_DEFENSE], ids=lambda path: path.stem
)
def test_the_code_of_a_page_runs(path: Path, reader: dict[str, Any]) -> None:
    for block in code_of(path):
        exec(compile(block, str(path), "exec"), reader)


# Figures


def tables_of(path: Path) -> Iterator[list[list[str]]]:
    """The tables of a page as rows of cells, the head first."""
    rows: list[list[str]] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            yield [rows[0], *rows[2:]]
            rows = []


def plain(name: str) -> str:
    """A method as the results name it."""
    return re.sub(r"[`*]|\[(.*?)\]\(.*?\)", r"\1", name).lower()


def measured() -> dict[tuple[str, str], set[str]]:
    """What the results say of a method under an attack: accuracy and attack success rate, or TPR and FPR."""
    found: dict[tuple[str, str], set[str]] = {}
    for head, *rows in tables_of(RESULTS):
        if not rows:
            continue
        if head[0] == "defence" and "/" in rows[0][1] + rows[-1][1]:
            cells = [(row[0], attack, cell) for row in rows for attack, cell in zip(head[1:], row[1:], strict=True)]
        elif head[:2] == ["attack", "defence"] and "TPR" in head:
            cells = [(row[1], row[0], f"{row[3]} / {row[4]}") for row in rows]
        elif head[:2] == ["defence", "seeds"]:
            cells = [(row[0], "clean", f"– / {row[4]}") for row in rows]
        else:
            continue
        for method, attack, cell in cells:
            found.setdefault((plain(method), attack.removesuffix(" (void)")), set()).add(cell)
    for line in FINE_TUNED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        cell = f"{100 * row['clean_accuracy']:.1f} / {100 * row['asr']:.1f}"
        found.setdefault((plain(row["defence"]), row["attack"]), set()).add(cell)
    return found


def claims() -> Iterator[tuple[Path, str, str, str]]:
    """Page, method, attack and cell of every figure that a page has from the results."""
    for path in PAGES:
        for head, *rows in tables_of(path):
            if head[:2] == ["attack", "undefended"]:
                for row in rows:
                    attack = "clean" if row[0] == "clean data" else row[0]
                    yield path, "undefended", attack, row[1]
                    yield from ((path, plain(head[2]), attack, cell) for cell in row[2:])
            elif head[0] == "defense" and {"badnets-5%", "sticker-5%"} & set(head):
                yield from (
                    (path, plain(row[0]), attack, cell)
                    for row in rows
                    for attack, cell in zip(head[1:], row[1:], strict=True)
                )
            elif head[0] == "method" and head[1] == "result":
                yield from ((path, plain(row[0]), "badnets-5%", cell) for row in rows for cell in row[1:])


def test_figures_of_the_pages_are_those_of_the_results() -> None:
    known, found = measured(), list(claims())
    assert len(found) > 100
    wrong = [
        (path.name, method, attack, cell)
        for path, method, attack, cell in found
        if cell != "–" and cell not in known.get((method, attack), set())
    ]
    assert not wrong


# What pages name


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for script in re.findall(r"\b(?:examples|benchmarks|tests)/[\w/]+\.\w+", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:benchmarks|tests|lightning_backdoor)[\w.]*)", text):
        assert find_spec(module), module


def test_the_readme_names_the_extras() -> None:
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)\n\[",
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert extras is not None
    for name in re.findall(r"^(\w+) = ", extras[1], re.MULTILINE):
        assert f"`{name}`" in README.read_text(encoding="utf-8"), name


# A defense of one's own


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the code of the page defines."""
    (code,) = code_of(OWN_DEFENSE)
    assert len(code.strip().splitlines()) <= 60
    defined: dict[str, Any] = {"__name__": "lowest_loss"}
    exec(compile(code, "lowest_loss.py", "exec"), defined)
    return defined


def test_the_defense_of_the_page_removes_and_trains_anew(page: dict[str, Any], tmp_path: Path) -> None:
    callback = page["LowestLossCallback"](fraction=0.125, warmup_epochs=2, report_dir=tmp_path)
    run = fit([callback], planted())
    assert len(callback.verdict.removed) == 12
    assert callback.history[0].restarts
    assert [epoch for epoch, _ in run.module.epochs()] == [0, 1, 0, 1, 2]
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert run.module.epochs()[-1][1] == kept
    assert (tmp_path / "report.html").exists()
    assert repr(callback).startswith("LowestLossCallback(fraction=0.125, warmup_epochs=2, report_dir=")


def test_with_a_report_alone_it_changes_nothing(page: dict[str, Any]) -> None:
    run = fit([page["LowestLossCallback"](warmup_epochs=2, response="report")], clean())
    assert [len(positions) for _, positions in run.module.epochs()] == [96, 96, 96]


@pytest.mark.parametrize("response", ["continue", "reset", "unlearn"])
@pytest.mark.filterwarnings("ignore:Lowest loss (after fine-tuning|ends with|looked at)")
def test_it_goes_with_the_other_responses(page: dict[str, Any], response: str) -> None:
    callback = page["LowestLossCallback"](fraction=0.125, warmup_epochs=1, response=response)
    fit([callback], planted())
    assert callback.history[0].response == response
    assert callback.history[0].removed == 12
    assert len(callback.verdict.removed) >= 12, "nothing comes back"
