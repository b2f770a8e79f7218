"""``python -m benchmarks.device_ratios``: what single steps cost on a device, beside a forward pass of ResNet-18.

One JSON line per measurement, when it is finished; times are medians in milliseconds. ``--only NAME ...`` chooses. On a
CPU the sizes are small: that shows that it runs, not what it costs. ``--only decision_cpu`` measures decisions of full
size on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import detections, rows
from benchmarks.networks import NAME, resnet18
from lightning_backdoor.functional import decide, local_median, nl_means

Measurement = Callable[[torch.device], Iterator[rows.Row]]

MEASUREMENTS: dict[str, Measurement] = {}
"""By name. A measurement takes a device and gives its rows."""
ROUNDS = 20


def measurement(name: str) -> Callable[[Measurement], Measurement]:
    """Register a measurement."""

    def register(function: Measurement) -> Measurement:
        MEASUREMENTS[name] = function
        return function

    return register


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(work: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a piece of work."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return 1000 * (time.perf_counter() - began)


def medians(works: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of pieces of work that take turns, after one turn that does not count."""
    rounds = ROUNDS if device.type == "cuda" else 1
    turns = [{name: once(work, device) for name, work in works.items()} for _ in range(rounds + 1)][1:]
    return {f"{name}_ms": round(statistics.median(turn[name] for turn in turns), 3) for name in works}


def photographs(number: int, side: int) -> Tensor:
    """Structure and a little noise, uint8 ``(number, 3, side, side)``."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, side // 8 + 2, side // 8 + 2, generator=generator) * 220
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noise = torch.randn(number, 3, side, side, generator=generator) * 4
    return (smooth + noise + 16).clamp(0, 255).to(torch.uint8)


def batches(device: torch.device) -> Iterator[tuple[Tensor, nn.Module]]:
    """Small and large images, and ResNet-18 with the stem for their size."""
    sizes = [(512, 32), (64, 224)] if device.type == "cuda" else [(4, 32), (1, 64)]
    for number, side in sizes:
        network = resnet18() if side == 32 else torchvision.models.resnet18(weights=None)
        yield photographs(number, side).to(device), network.to(device).eval()


def forward(network: nn.Module, pixels: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Any]:
    """A forward pass over the pixels, in single or in mixed precision."""
    values = pixels.float() / 255

    def run() -> None:
        with torch.inference_mode(), torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype is not None):
            network(values)

    return run


@measurement("nl_means")
def denoisers(device: torch.device) -> Iterator[rows.Row]:
    """Both filters of UltraClean; `nl_means` costs at most a forward pass on the same images."""
    for pixels, network in batches(device):
        first = once(lambda pixels=pixels: nl_means(pixels), device)
        works = {
            "nl_means": lambda pixels=pixels: nl_means(pixels),
            "local_median": lambda pixels=pixels: local_median(pixels),
            "forward": forward(network, pixels),
        }
        if device.type == "cuda":
            works["forward_bf16"] = forward(network, pixels, torch.bfloat16)
        found = medians(works, device)
        ratio = round(found["nl_means_ms"] / found["forward_ms"], 3)
        yield {"shape": list(pixels.shape), "first_ms": round(first), **found, "ratio": ratio}


@measurement("scan")
def scans(device: torch.device) -> Iterator[rows.Row]:
    """A whole detection of each defence over one epoch of training; on a CPU, of one."""
    gpu = device.type == "cuda"
    images, pixels, batch_size, workers = (20_000, 32, 512, 8) if gpu else (40, 16, 20, 0)
    model = "resnet18" if gpu else NAME
    options = argparse.Namespace(device=device.type, batch_size=batch_size, workers=workers, model=model)
    data = detections.Photographs(images, pixels)
    for name in detections.DEFENCES if gpu else ["NONE"]:
        row = detections.detection(name, data, options)
        yield {"images": images, **row, "ratio": row["detection_epochs"]}


def measured_samples(samples: int, units: int, labels: int) -> tuple[Tensor, Tensor]:
    """Rectified responses of units to clean samples, half ``(samples, units)``, and their labels."""
    generator = torch.Generator().manual_seed(0)
    given = torch.arange(samples) % labels
    centers, values = torch.randn(labels, units, generator=generator), torch.empty(samples, units, dtype=torch.half)
    for place in torch.split(torch.arange(samples), 2**14):
        values[place] = (centers[given[place]] + torch.randn(len(place), units, generator=generator)).relu().half()
    return values, given


@measurement("decision")
def decisions(device: torch.device) -> Iterator[rows.Row]:
    """From what a scan measured to the samples that stay, nothing found: 50,000 images at most 1 s on a GPU."""
    samples, units, labels = (50_000, 512, 10) if device.type == "cuda" else (2_000, 64, 10)
    values, given = measured_samples(samples, units, labels)
    values, ranking = values.to(device), torch.zeros(samples)
    work = {"decision": lambda: decide(values, ranking, given, all_to_all=True)}
    yield {"shape": [samples, units, labels], **medians(work, device)}


@measurement("decision_cpu")
def decisions_on_a_cpu(device: torch.device) -> Iterator[rows.Row]:
    """The same of full size on a CPU: 50,000 samples at most 2 s on two cores, a million of 1,000 labels 10 s."""
    for shape in ((50_000, 512, 10), (1_000_000, 512, 1_000)):
        values, given = measured_samples(*shape)
        ranking = torch.zeros(len(given))
        work = {"decision": partial(decide, values, ranking, given, all_to_all=True)}
        yield {"shape": list(shape), "threads": torch.get_num_threads(), **medians(work, torch.device("cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), help="in place of all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    for name in options.only or [name for name in MEASUREMENTS if name != "decision_cpu"]:
        for row in MEASUREMENTS[name](device):
            about = {"measurement": name, **row, **rows.circumstances("benchmarks.device_ratios", device.type)}
            print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
