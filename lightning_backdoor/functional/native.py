"""The inner loop of non-local means in C, compiled at first use where there is a C compiler.

PyTorch's single operations go through memory some twenty times per offset; this goes through it once. It does the same
multiplications as ``nlm.smooth_tiles`` and sums whole numbers that float32 holds exactly, whatever their order, so the
results are equal bit for bit and nothing but speed depends on the compiler.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["LANES", "native_kernel"]

LANES = 16  # images that the kernel treats at once
LARGEST_TEMPLATE = 11  # patches of two planes whose squared differences, 2 · 255² each, sum up to less than 2^24

# tiles [planes][height + 2m][width + 2m], means [planes][height][width], scratch [height * width + 2 (width + 2m)]; all
# in vectors of LANES floats. An offset and its opposite share a map of weights that begins dy rows above the image.
# `column` holds squared differences summed over the rows of a patch, exact because they are whole numbers below 2^24.
SOURCE = """
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int mask __attribute__((vector_size(4 * LANES)));
#define ROUND_DOWN(x) __builtin_convertvector(__builtin_convertvector(x, mask), vec)

static inline __attribute__((always_inline)) vec squares(const vec *here, long apart, long plane, const int planes)
{
    vec sum = {};
    for (int p = 0; p < planes; p++) {
        vec d = here[p * plane] - here[p * plane + apart];
        sum += d * d;
    }
    return sum;
}

static inline __attribute__((always_inline)) void gather(
    vec *total, vec *means, const vec *weight, const vec *pixel, long plane, long area, const int planes, int count)
{
    for (int x = 0; x < count; x++) {
        total[x] += weight[x];
        for (int p = 0; p < planes; p++) means[p * area + x] += weight[x] * pixel[p * plane + x];
    }
}

static inline __attribute__((always_inline)) void run(
    const vec *tiles, vec *means, vec *scratch, const int planes, int height, int width, int reach, const float *fall)
{
    const int half = TEMPLATE / 2, m = reach + half;
    const long stride = width + 2 * m, plane = stride * (height + 2 * m), area = (long)height * width;
    const vec *centre = tiles + m * stride + m;
    vec *total = scratch, *column = total + area, *weight = column + stride;
    const float unit = fall[0], last = fall[1], a = fall[2], b = fall[3], c = fall[4];

    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            total[(long)y * width + x] = (vec){} + 1.0f;
            for (int p = 0; p < planes; p++) means[p * area + (long)y * width + x] = centre[p * plane + y * stride + x];
        }
    for (int dy = 0; dy <= reach; dy++)
        for (int dx = dy ? -reach : 1; dx <= reach; dx++) {
            const int left = dx > 0 ? dx : 0, columns = width + (dx > 0 ? dx : -dx), sums = columns + TEMPLATE - 1;
            const long apart = dy * stride + dx;
            for (int x = 0; x < sums; x++) column[x] = (vec){};
            for (int r = 0; r < height + dy + TEMPLATE - 1; r++) {
                const int y = r - (TEMPLATE - 1) - dy;
                const vec *patch = centre + (r - dy - half) * stride - left - half;
                const vec *gone = patch - TEMPLATE * stride;
                if (r < TEMPLATE)
                    for (int x = 0; x < sums; x++) column[x] += squares(patch + x, apart, plane, planes);
                else
                    for (int x = 0; x < sums; x++)
                        column[x] += squares(patch + x, apart, plane, planes) - squares(gone + x, apart, plane, planes);
                if (r < TEMPLATE - 1) continue;
                for (int x = 0; x < columns; x++) {
                    vec distance = column[x];
                    for (int i = 1; i < TEMPLATE; i++) distance += column[x + i];
                    distance = ROUND_DOWN(distance * unit);
                    vec w = ((distance * a + b) * distance + c) * distance + 1.0f;
                    w *= w; w *= w; w *= w; w *= w;
                    weight[x] = (vec)((mask)w & (distance <= last));
                }
                if (y + dy < height)
                    gather(total + (long)(y + dy) * width, means + (long)(y + dy) * width, weight + left - dx,
                           centre + y * stride - dx, plane, area, planes, width);
                if (y >= 0)
                    gather(total + (long)y * width, means + (long)y * width, weight + left,
                           centre + (y + dy) * stride + dx, plane, area, planes, width);
            }
        }
    for (int p = 0; p < planes; p++)
        for (long i = 0; i < area; i++) means[p * area + i] = ROUND_DOWN(means[p * area + i] / total[i] + 0.5f);
}

void smooth(const vec *tiles, vec *means, vec *scratch, int planes, int height, int width, int reach, const float *fall)
{
    if (planes == 1) run(tiles, means, scratch, 1, height, width, reach, fall);
    else if (planes == 2) run(tiles, means, scratch, 2, height, width, reach, fall);
}
"""


@cache
def native_kernel(template: int) -> Callable[..., None] | None:
    """Return the compiled kernel for patches of side ``template``, or ``None`` where none can be had.

    There is none for patches so large that the order of a sum would matter.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if os.name != "posix" or compiler is None or template > LARGEST_TEMPLATE:
        return None
    command = [*compiler.split(), "-O3", "-march=native", "-ffp-contract=off", "-w", "-fPIC", "-shared", "-x", "c"]
    macros = [f"-DTEMPLATE={template}", f"-DLANES={LANES}"]
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = Path(folder) / "nlm.so"
            subprocess.run(
                [*command, *macros, "-", "-o", str(library)],
                input=SOURCE.encode(),
                check=True,
                capture_output=True,
                timeout=60,
            )
            kernel: Callable[..., None] = ctypes.CDLL(str(library)).smooth
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None
    kernel.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 4 + [ctypes.c_void_p]  # type: ignore[attr-defined]
    kernel.restype = None  # type: ignore[attr-defined]
    return kernel
