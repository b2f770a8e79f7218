"""The kernels of non-local means in Triton's language; importing this module imports Triton.

With :math:`c` the product of two patches, summed over their pixels, and :math:`e` the sum of squares of one, the patch
distance is :math:`e_1 + e_2 - 2 c`. All three are whole numbers in 32 bits, so the order of summation does not matter.
The device multiplies four bytes by four bytes and sums up in one instruction: packing puts into every 64-bit word a
pixel and those to its right, eight of one plane or four of each of two planes. A row of a patch of side 7 takes one
word of a single plane and two words of two planes.

A thread smooths ``ROWS`` pixels, one above the other. It keeps the words of their patches and the sums of weights and
weighted values in registers, and goes through the offsets of the search window: for each it reads the words there,
multiplies row by row, and slides the sum over the rows of a patch down the pixels. Offsets come in the order of
``nlm.smooth_tiles``, and multiplications and additions are not contracted (``enable_fp_fusion=False`` at the launch),
so the results are equal bit for bit.

Triton's time for compiling a kernel grows with the square of its operations times its loads (``TritonGPUCoalesce``
follows every load through all operations), hence the wide words and few ``ROWS``.
"""

import triton
import triton.language as tl

from lightning_backdoor.functional.nlm import BEND, FOOT, FORWARD, LIGHTNESS, SLOPE, TO_RGB

__all__ = ["means", "pack", "to_planes", "to_rgb"]

TO_X, TO_Y, TO_Z = (tl.constexpr(row) for row in FORWARD)
SCALE, OFFSET = tl.constexpr(LIGHTNESS[0]), tl.constexpr(LIGHTNESS[1])
FIRST, SECOND, THIRD = (tl.constexpr(row) for row in TO_RGB)
CURVED_FROM, STEEPNESS, GROUND = tl.constexpr(SLOPE * BEND + FOOT), tl.constexpr(SLOPE), tl.constexpr(FOOT)


@triton.jit
def _reflected(place, length):
    """Reflect places from 0 on at the last index, without repeating it, and back at the first."""
    period = tl.maximum(2 * length - 2, 1)
    place = place % period
    return tl.minimum(tl.minimum(place, period - place), length - 1)


@triton.jit
def _mixed(first, second, third, ROW: tl.constexpr):
    """Weight three channels, one product after the other."""
    return first * ROW[0] + second * ROW[1] + third * ROW[2]


@triton.jit
def _rounded(value):
    """Round to a whole number of grey levels."""
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def _byte(word, BYTE: tl.constexpr):
    """Take a byte out of a word, as a number."""
    return ((word >> (8 * BYTE)).to(tl.int32) & 255).to(tl.float32)


@triton.jit(
    do_not_specialize=["places", "height", "width", "tall", "margin"], do_not_specialize_on_alignment=["images"]
)
def to_planes(
    images, padded, bent, places, height, width, tall, margin,
    PITCH: tl.constexpr, COLOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the planes with their margin: from ``(N, C, H, W)`` to ``(N, tall, C, PITCH)``, in bytes."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    line = place // PITCH
    image = line // tall
    # A margin may be longer than the image: a multiple of the period comes before it.
    y = _reflected((line % tall).to(tl.int32) + margin * (tl.maximum(2 * height - 2, 1) - 1), height)
    x = _reflected((place % PITCH).to(tl.int32) + margin * (tl.maximum(2 * width - 2, 1) - 1), width)
    area = height * width
    pixel = images + y * width + x
    if COLOR:
        pixel += image * 3 * area
        # The channels come in the order of OpenCV: blue takes the place of red.
        first = tl.load(pixel + 2 * area, mask=inside, other=0).to(tl.float32)
        second = tl.load(pixel + area, mask=inside, other=0).to(tl.float32)
        third = tl.load(pixel, mask=inside, other=0).to(tl.float32)
        fx = tl.load(bent + (_mixed(first, second, third, TO_X) + 0.5).to(tl.int32))
        fy = tl.load(bent + (_mixed(first, second, third, TO_Y) + 0.5).to(tl.int32))
        fz = tl.load(bent + (_mixed(first, second, third, TO_Z) + 0.5).to(tl.int32))
        target = padded + line * 3 * PITCH + place % PITCH
        tl.store(target, _rounded(fy * SCALE - OFFSET), mask=inside)
        tl.store(target + PITCH, _rounded((fx - fy) * 500.0 + 128.0), mask=inside)
        tl.store(target + 2 * PITCH, _rounded((fy - fz) * 200.0 + 128.0), mask=inside)
    else:
        tl.store(padded + place, tl.load(pixel + image * area, mask=inside, other=0), mask=inside)


@triton.jit(do_not_specialize=["places", "first"])
def pack(
    padded, words, squares, places, first,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, TEMPLATE: tl.constexpr, PITCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the word of every place, and the sum of squares of the patch with its upper left corner there."""
    PIXELS: tl.constexpr = 8 // PLANES
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    line, x = place // PITCH, place % PITCH
    source = padded + (line * CHANNELS + first) * PITCH + x
    lines = places // PITCH
    word = tl.full((BLOCK,), 0, tl.int64)
    for byte in range(8):
        plane, column = byte // PIXELS, byte % PIXELS
        pixel = tl.load(source + plane * PITCH + column, mask=(place < places) & (x + column < PITCH), other=0)
        word |= pixel.to(tl.int64) << (8 * byte)
    tl.store(words + place, word, mask=place < places)
    energy = tl.full((BLOCK,), 0, tl.int32)
    for step in range(PLANES * TEMPLATE * TEMPLATE):
        row, column = step // TEMPLATE % TEMPLATE, step % TEMPLATE
        there = source + (step // (TEMPLATE * TEMPLATE) + row * CHANNELS) * PITCH + column
        pixel = tl.load(there, mask=(line + row < lines) & (x + column < PITCH), other=0).to(tl.int32)
        energy += pixel * pixel
    tl.store(squares + place, energy, mask=place < places)


@triton.jit
def _dot(a, b, total, NATIVE: tl.constexpr):
    """Add the products of eight bytes and eight bytes."""
    if NATIVE:
        total = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a0, a1, b0, b1;
            mov.b64 {a0, a1}, $1;
            mov.b64 {b0, b1}, $2;
            dp4a.u32.u32 a0, a0, b0, $3;
            dp4a.u32.u32 $0, a1, b1, a0;
            }
            """,
            "=r,l,l,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # Triton's interpreter
        for byte in tl.static_range(8):
            total += (((a >> (8 * byte)) & 255) * ((b >> (8 * byte)) & 255)).to(tl.int32)
    return total


@triton.jit(do_not_specialize=["first", "number", "height", "width", "tall", "last"])
def means(
    words, squares, smooth, first, number, height, width, tall, last, cubic, square, linear,
    CHANNELS: tl.constexpr, PLANES: tl.constexpr, TEMPLATE: tl.constexpr, SHIFT: tl.constexpr, REACH: tl.constexpr,
    PITCH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Write the weighted means of the planes of a group, bytes ``(N, C, H, W)``. A lane is a column of an image."""
    HALF: tl.constexpr = TEMPLATE // 2
    PIXELS: tl.constexpr = 8 // PLANES
    WORDS: tl.constexpr = (TEMPLATE + PIXELS - 1) // PIXELS
    LAST: tl.constexpr = (1 << 8 * ((TEMPLATE - 1) % PIXELS + 1)) - 1  # the bytes of a plane in the last word of a row
    LAST_WORD: tl.constexpr = LAST if PLANES == 1 else LAST * (2**32 + 1)
    SIDE: tl.constexpr = 2 * REACH + 1
    MIDDLE: tl.constexpr = SIDE * SIDE // 2
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lane < number * width
    lane = tl.minimum(lane, number * width - 1)
    image = (lane // width).to(tl.int64)
    x = lane % width
    top = tl.program_id(1) * ROWS
    here = (image * tall + top + REACH) * PITCH + x + REACH  # the corner of the patch of the first pixel
    mine = ()
    for row in tl.static_range(ROWS + TEMPLATE - 1):
        for word in tl.static_range(WORDS):
            own = tl.load(words + here + (row * PITCH + PIXELS * word))
            if word == WORDS - 1:
                own &= LAST_WORD  # zeros: what the other word has beyond the patch does not count
            mine = mine + (own,)
    energies = ()
    totals = ()
    weighted = ()
    for row in tl.static_range(ROWS):
        energies = energies + (tl.load(squares + here + row * PITCH),)
        totals = totals + (tl.full((LANES,), 1.0, tl.float32),)  # a pixel has weight 1 for itself
        for plane in tl.static_range(PLANES):
            weighted = weighted + (_byte(mine[(row + HALF) * WORDS], plane * PIXELS + HALF),)
    for turn in range(2 * MIDDLE):  # an offset after its opposite
        index = MIDDLE + 1 + turn // 2
        away = (index // SIDE - REACH) * PITCH + index % SIDE - REACH
        there = here + tl.where(turn % 2 == 0, -away, away)
        dots = ()
        theirs = ()
        for row in tl.static_range(ROWS + TEMPLATE - 1):
            dot = 0
            for word in tl.static_range(WORDS):
                other = tl.load(words + there + (row * PITCH + PIXELS * word))
                dot = _dot(mine[row * WORDS + word], other, dot, NATIVE)
                if word == 0:
                    theirs = theirs + (other,)
            dots = dots + (dot,)
        product = dots[0]
        for row in tl.static_range(1, TEMPLATE):
            product += dots[row]
        sums = ()
        heavier = ()
        for row in tl.static_range(ROWS):
            if row > 0:
                product += dots[row + TEMPLATE - 1] - dots[row - 1]
            distance = energies[row] + tl.load(squares + there + row * PITCH) - 2 * product
            step = distance >> SHIFT
            steps = step.to(tl.float32)
            weight = ((steps * cubic + square) * steps + linear) * steps + 1.0
            weight *= weight
            weight *= weight
            weight *= weight
            weight *= weight
            weight = tl.where(step <= last, weight, 0.0)
            heavier = heavier + (totals[row] + weight,)
            for plane in tl.static_range(PLANES):
                value = _byte(theirs[row + HALF], plane * PIXELS + HALF)
                sums = sums + (weighted[row * PLANES + plane] + weight * value,)
        totals = heavier
        weighted = sums
    for row in tl.static_range(ROWS):
        for plane in tl.static_range(PLANES):
            mean = tl.floor(tl.div_rn(weighted[row * PLANES + plane], totals[row]) + 0.5)
            place = ((image * CHANNELS + first + plane) * height + top + row) * width + x
            tl.store(smooth + place, mean.to(tl.uint8), mask=inside & (top + row < height))


@triton.jit
def _linear(bent):
    """Invert the bent cube root."""
    straight = tl.div_rn(bent - GROUND, tl.full(bent.shape, STEEPNESS, tl.float32))
    return tl.where(bent > CURVED_FROM, bent * bent * bent, straight)


@triton.jit
def _fine(x, y, z, ROW: tl.constexpr):
    """Mix a channel, round it to 12 bits and cut it to 8."""
    value = tl.minimum(tl.maximum(tl.floor(_mixed(x, y, z, ROW) * 4096.0 + 0.5), 0.0), 4095.0)
    return (value * (255 / 4096)).to(tl.uint8)


@triton.jit(do_not_specialize=["pixels", "area"])
def to_rgb(smooth, pixels, area, BLOCK: tl.constexpr):
    """Convert L*a*b* to pixels, in place."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    place = smooth + pixel // area * 3 * area + pixel % area
    lightness = tl.load(place, mask=inside, other=0).to(tl.float32)
    a = tl.load(place + area, mask=inside, other=0).to(tl.float32) - 128.0
    b = tl.load(place + 2 * area, mask=inside, other=0).to(tl.float32) - 128.0
    y = tl.div_rn(lightness * (100 / 255) + 16.0, tl.full((BLOCK,), 116.0, tl.float32))
    x = _linear(y + tl.div_rn(a, tl.full((BLOCK,), 500.0, tl.float32)))
    z = _linear(y - tl.div_rn(b, tl.full((BLOCK,), 200.0, tl.float32)))
    y = _linear(y)
    tl.store(place + 2 * area, _fine(x, y, z, FIRST), mask=inside)
    tl.store(place + area, _fine(x, y, z, SECOND), mask=inside)
    tl.store(place, _fine(x, y, z, THIRD), mask=inside)
