"""How many pixels a thread of `nl_means` should smooth on a CUDA device, in programs of how many threads.

``python -m tests.timing.nlm_rows``: one JSON line per choice, milliseconds; about half a minute, most of it compiling.
"""

from __future__ import annotations

import json

import torch

from benchmarks.device_ratios import medians, once, photographs
from lightning_backdoor.functional import nl_means
from lightning_backdoor.functional.denoising import device_kernel

CHOICES = [(4, 128), (8, 128), (2, 128), (4, 64), (4, 256)]


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for number, side in [(512, 32), (64, 224)]:
        pixels = photographs(number, side).to(device)
        launched = device_kernel(device, True, side, 7, 13)
        assert launched is not None
        expected = nl_means(pixels)
        for launched.ROWS, launched.LANES in CHOICES:
            compiling = once(lambda pixels=pixels: nl_means(pixels), device)
            found = medians({"nl_means": lambda pixels=pixels: nl_means(pixels)}, device)
            told = {"side": side, "rows": launched.ROWS, "lanes": launched.LANES, "first_ms": round(compiling), **found}
            print(json.dumps({**told, "same": torch.equal(nl_means(pixels), expected)}), flush=True)


if __name__ == "__main__":
    main()
