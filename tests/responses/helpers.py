"""A defense that finds a given group of images, and images of which such a group has wrong or right labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_backdoor import Finding, Verdict
from lightning_backdoor.callbacks import Defense, Detector
from lightning_backdoor.responses import Detection, Response, Session
from tests.callbacks.helpers import Net, Pictures

SIZE, MEMBERS = 160, 20


def pictures(*, wrong: bool) -> tuple[Pictures, Tensor]:
    """Twenty of 160 images are of classes 1 to 3 with the label 0, or of class 0; their positions."""
    data = Pictures(SIZE)
    members = ((data.targets > 0) if wrong else (data.targets == 0)).nonzero().squeeze(1)[:MEMBERS]
    data.targets[members] = 0
    return data, members


class Scripted(Detector):
    """Finds one group."""

    def __init__(self, members: Tensor) -> None:
        self.members = members

    def detect(self, session: Session) -> Detection:
        labels = session.scanner.read_labels(session.trainer, session.module)
        keep = torch.ones(len(labels), dtype=torch.bool).index_fill(0, self.members, False)
        found = Finding(0, self.members, "scripted", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)
        return Detection(Verdict((~keep).float(), keep, 0.5, "scripted", labels, findings=(found,)), len(self.members))


class Scripts(Defense):
    """Unlearns what is found, after three epochs."""

    method = title = "Scripts"

    def __init__(self, members: Tensor, response: Response) -> None:
        super().__init__(detector=Scripted(members), response=response, warmup_epochs=3, max_removed=0.5)


class Uncopied(Net):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


class Torn(Net):
    """Copies of it fail in one process, the last one, with an error that is none of this library's."""

    copied = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.copied = True

    def forward(self, images: Tensor) -> Tensor:
        if self.copied and self.trainer.global_rank == self.trainer.world_size - 1:
            raise OSError("a file is cut off")
        return super().forward(images)
