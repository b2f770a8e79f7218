"""Both Lightning packages: callbacks of every base in Trainers of both, one package hidden, names that must not go."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper as FabricWrapper
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_backdoor import _lightning as compat
from lightning_backdoor._lightning import LEDGER, TORCH_LEDGER, CallbackBase, limited, wrapped_sampler
from lightning_backdoor.loading.loader_filter import clone
from lightning_backdoor.loading.samplers import KeepState
from tests.loading.recording import (
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    SAFE_LOADING,
    Points,
    Pruner,
    Recording,
    UnifiedRecording,
    expect_pruned,
    loader,
    make_trainer,
)

pytestmark = LIGHTNING_WARNS
PACKAGES = {"pytorch_lightning": (pl, Recording), "lightning.pytorch": (unified, UnifiedRecording)}


@pytest.mark.case("67")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("single", [False, True])
def test_one_callback_class_serves_both_packages(package: str, single: bool, tmp_path: Any) -> None:
    trainers, module_class = PACKAGES[package]
    pruner = Pruner()
    assert isinstance(pruner, trainers.Callback)
    module = module_class()
    trainer = make_trainer(pruner if single else [pruner], package=trainers)
    trainer.fit(module, loader(shuffle=True))
    expect_pruned(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again, resumed = Pruner(), module_class()
    trainer = make_trainer(again if single else [again], package=trainers, max_epochs=6)
    trainer.fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "last.ckpt", **SAFE_LOADING)
    assert torch.equal(again.mask, KEEP)
    assert [set(resumed.drawn(epoch)) for epoch in sorted(resumed.batches)] == [KEPT, KEPT]


HIDDEN = """
import sys
sys.modules[{hidden!r}] = None
import {other} as package
from lightning_backdoor._lightning import CallbackBase
assert issubclass(CallbackBase, package.Callback)
assert CallbackBase.__bases__ == (package.Callback,), CallbackBase.__bases__
from lightning_backdoor.loading.loader_filter import loader_filter_of
trainer = package.Trainer(accelerator="cpu", logger=False, callbacks=[CallbackBase()])
loader_filter_of(trainer).join("a")
loader_filter_of(trainer).leave("a")
print("served by", package.__name__)
"""


@pytest.mark.case("68")
def test_one_package_is_enough() -> None:
    running = {}
    for hidden, other in (("pytorch_lightning", "lightning.pytorch"), ("lightning", "pytorch_lightning")):
        command = [sys.executable, "-c", HIDDEN.format(hidden=hidden, other=other)]
        running[other] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for other, process in running.items():
        output, errors = process.communicate(timeout=300)
        assert f"served by {other}" in output, errors


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        compat._callback_classes()


def test_a_broken_package_is_named_and_the_other_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "lightning.pytorch":
            raise AttributeError("half an installation")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"`import lightning.pytorch` failed \(half an installation\)"):
        assert compat._callback_classes() == (pl.Callback,)


OPTIONAL = {"trainer._val_check_time_interval": (2, 6)}
"""Names that may be None, and the version that brought them."""


def version_of(package: str) -> tuple[int, ...]:
    version = importlib.metadata.version(package.partition(".")[0].replace("_", "-"))
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@pytest.mark.parametrize("package", PACKAGES)
def test_private_names_exist(package: str) -> None:
    trainers, module_class = PACKAGES[package]
    values: dict[str, Any] = {}

    class Looking(trainers.Callback):  # type: ignore[name-defined, misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            roots = {
                "trainer": trainer,
                "pl_module": pl_module,
                "Timer": trainers.callbacks.Timer({"seconds": 1}),
                "EarlyStopping": trainers.callbacks.EarlyStopping("loss"),
                "ModelCheckpoint": trainers.callbacks.ModelCheckpoint(),
                "DistributedSamplerWrapper": FabricWrapper(SequentialSampler(Points()), num_replicas=2, rank=0),
            }
            for name in LEDGER:
                root, _, path = name.partition(".")
                try:
                    values[name] = operator.attrgetter(path)(roots[root])
                except AttributeError:
                    values[name] = None

    make_trainer([Looking()], package=trainers, max_epochs=1).fit(module_class(), loader())
    assert values.keys() == LEDGER.keys()
    missing = {name: LEDGER[name] for name, value in values.items() if value is None and name not in OPTIONAL}
    assert not missing, f"{package} {version_of(package)} lost a name, and with it: {missing}"
    trainer = make_trainer([], package=trainers)
    for name, since in OPTIONAL.items():
        assert version_of(package) < since or hasattr(trainer, name.removeprefix("trainer.")), name


@pytest.mark.parametrize("name", TORCH_LEDGER)
def test_private_names_of_torch_exist(name: str) -> None:
    holder, _, attribute = name.rpartition(".")
    found = {
        "torch.nn.Module": torch.nn.Linear(1, 1),
        "torch.nn.MultiheadAttention": torch.nn.MultiheadAttention(1, 1),
        "torch.Tensor": torch.zeros(1),
        "torch.optim.Optimizer": torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True),
        "torch.utils.data.DataLoader": DataLoader(Points()),
    }
    assert hasattr(found[holder] if holder in found else importlib.import_module(holder), attribute), TORCH_LEDGER[name]


ROOT = Path(compat.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
PUBLIC = {"_fields", "_replace"}
"""Documented names of named tuples."""
OF_DATASETS = {"_format_kwargs"}
"""Where a Hugging Face dataset keeps its transform; without it, that transform cannot be told from the dataset."""


def is_private(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"_(?!_)[A-Za-z]\w*", name)) and name not in PUBLIC


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Private names that a module defines, or reads from its own instances; those that it takes from elsewhere."""
    own: set[str] = set()
    taken: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (own if is_own and isinstance(node.ctx, ast.Store) else taken).add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)  # a field of a dataclass
        elif isinstance(node, ast.Constant):  # for `getattr`, `hasattr` and `vars`
            taken.add(node.value if isinstance(node.value, str) else "")
        elif isinstance(node, ast.keyword):
            taken.add(node.arg or "")
        elif isinstance(node, ast.ImportFrom):
            taken |= {alias.name for alias in node.names}
    return set(filter(is_private, own)), set(filter(is_private, taken))


def foreign_accesses(tree: ast.AST, names: set[str]) -> set[str]:
    """Names among these that a module reads from or writes to an object other than ``self``."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in names]
    return {n.attr for n in found if not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls"))}


def private_names_listed() -> set[str]:
    return {part for name in (*LEDGER, *TORCH_LEDGER) for part in name.split(".") if is_private(part)}


TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in MODULES}
OWN = set.union(*(private_names(tree)[0] for tree in TREES.values()))


@pytest.mark.parametrize("path", [path for path in MODULES if path != Path("_lightning.py")], ids=str)
def test_private_names_of_others_stay_in_one_module(path: Path) -> None:
    allowed = OWN | (OF_DATASETS if path == Path("data/nesting.py") else set()) | {"_lightning_backdoor_origin"}
    assert not private_names(TREES[path])[1] - allowed
    assert not foreign_accesses(TREES[path], private_names_listed())


def test_every_private_name_in_use_is_listed_and_no_other() -> None:
    own, taken = private_names(TREES[Path("_lightning.py")])
    assert taken - (own - private_names_listed()) == private_names_listed()


@pytest.mark.parametrize(
    "line",
    [
        "trainer.fit_loop._combined_loader",
        "getattr(trainer, '_val_check_time_interval', None)",
        "self.trainer._results = None",
        "vars(loader).update(_iterator=None)",
        "from torch.utils.data.dataloader import _BaseDataLoaderIter",
        "torch._C.DisableTorchFunctionSubclass()",
    ],
)
def test_a_private_name_is_seen_however_it_is_taken(line: str) -> None:
    own, taken = private_names(ast.parse(line))
    assert not own
    assert len(taken) == 1


def test_own_names_and_those_of_named_tuples_are_not_private_ones_of_others() -> None:
    own, taken = private_names(ast.parse("self._mask = keep._replace(a=1)\nself._mask"))
    assert own == taken == {"_mask"}


def test_names_that_are_called_may_be_called() -> None:
    trainer = make_trainer([])
    assert callable(trainer.fit_loop.setup_data)
    assert callable(trainer.strategy.process_dataloader)


def test_a_loader_lives_in_its_dict_and_its_iterator_has_the_name_we_reset() -> None:
    train = DataLoader(Points(), batch_size=8, num_workers=1, persistent_workers=True)
    iter(train)
    assert vars(train)["_iterator"] is not None
    twin = clone(train, KeepState())
    assert twin._iterator is None
    assert vars(train)["_iterator"] is not None
    assert twin.dataset is train.dataset
    assert type(twin) is type(train)
    assert twin.sampler is twin.batch_sampler.sampler is not train.sampler


def test_the_sampler_inside_lightnings_wrapper_is_found() -> None:
    inner = SequentialSampler(Points())
    assert wrapped_sampler(FabricWrapper(inner, num_replicas=2, rank=0)) is inner
    assert wrapped_sampler(DistributedSampler(Points(), num_replicas=2, rank=0)) is None


@pytest.mark.parametrize(
    ("length", "limit", "batches"),
    [(6, 1.0, 6), (6, 0.5, 3), (7, 0.5, 3), (6, 4, 4), (6, 9, 6), (float("inf"), 1.0, float("inf"))],
)
def test_limits_follow_lightnings_rule(length: float, limit: float, batches: float) -> None:
    assert limited(length, limit) == batches


def test_the_base_has_no_surprises() -> None:
    assert CallbackBase.__mro__[1:3] == (pl.Callback, unified.Callback)
    assert CallbackBase().state_dict() == {}
