"""The user's data: repeatable views, augmentation off, batches of any structure, pixel space."""

from lightning_backdoor.data.batches import BatchFn, BatchLayout, find_layout
from lightning_backdoor.data.nesting import paths_of, transforms_of
from lightning_backdoor.data.pixels import PixelSpace, check_finite, infer_pixel_space
from lightning_backdoor.data.transforms import EvalTransform, choose_transform, transforms_swapped
from lightning_backdoor.data.views import IndexedView, check_dataset, scan_loader

__all__ = [
    "BatchFn",
    "BatchLayout",
    "EvalTransform",
    "IndexedView",
    "PixelSpace",
    "check_dataset",
    "check_finite",
    "choose_transform",
    "find_layout",
    "infer_pixel_space",
    "paths_of",
    "scan_loader",
    "transforms_of",
    "transforms_swapped",
]
