"""Progress of a long pass over the data, in the form of the Trainer's progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning_utilities.core.rank_zero import rank_zero_info
from tqdm.auto import tqdm  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["progress"]

PATIENCE_S = 2.0  # shorter passes show nothing

Show = Callable[[int], Any]


@contextmanager
def progress(trainer: Trainer, description: str, total: int) -> Iterator[Show]:
    """Yield ``advance(n)``, which shows progress once the pass has run for two seconds.

    A tqdm bar gets a second line, a rich display gets one more task, any other bar a message every 10 %. Nothing is
    shown on ranks other than 0 or when the Trainer's progress bar is off.

    Args:
        trainer: Its ``progress_bar_callback`` decides about the form.
        description: What is computed, for example ``"UltraClean: scanning"``.
        total: Number of samples of this rank.
    """
    started, done, show = time.monotonic(), 0, cast("Show | None", None)
    with ExitStack() as stack:

        def advance(count: int) -> None:
            nonlocal done, show
            done += count
            if show is None:
                if time.monotonic() - started < PATIENCE_S:
                    return
                show = stack.enter_context(_display(trainer, description, total))
                count = done
            show(count)

        yield advance


@contextmanager
def _display(trainer: Trainer, description: str, total: int) -> Iterator[Show]:
    bar: Any = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero:
        yield _nothing
    elif getattr(bar, "progress", None) is not None:
        # Lightning finds its tasks by their position, so a finished task is hidden and never removed.
        task = bar.progress.add_task(description, total=total)
        try:
            yield lambda count: bar.progress.update(task, advance=count, refresh=True)
        finally:
            bar.progress.update(task, visible=False, refresh=True)
    elif _is_tqdm(bar):
        with tqdm(desc=description, total=total, leave=False, position=1, unit="img", dynamic_ncols=True) as line:
            yield line.update
    else:
        yield _messages(description, total)


def _is_tqdm(bar: Any) -> bool:
    return any(cls.__name__ == "TQDMProgressBar" for cls in type(bar).__mro__)


def _messages(description: str, total: int) -> Show:
    done, shown = 0, 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        tenth = 10 * done // max(total, 1)
        if tenth > shown:
            shown = tenth
            rank_zero_info(f"{description}: {10 * tenth} % ({done} of {total})")

    return advance


def _nothing(count: int) -> None:
    """Show nothing."""
