"""The part of the manifest's schema that is about a video tokenizer; ``manifest.check`` says what a schema is for.

{"kind": "video", "downsampling": 8, "time_downsampling": 4, "frames": 17, "image_size": [128, 128],
 "codebook_size": 64000, "config": {levels, widths, strides, res_blocks, last_blocks, norm_groups},
 "weights": where the decoder's tensors lie, by name}
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from par_runtime.checked import Value
from par_runtime.video_shapes import decoder_layers, tensor_shapes

VIDEO = "video"  #: the tokenizer's kind; an image tokenizer has none
#: The decoder of the first latent frame, and that of each other one.
FIRST, NEXT = "decoder_first", "decoder_next"
MOST_LEVELS = 10  #: between which pixels become half as many
MOST_WIDTH, MOST_BLOCKS = 2**16, 2**8
MOST_SIDE = 2**14  #: pixels of an image's side
MOST_PIXELS = 2**28  #: of all frames of a clip: as many as the largest image has
CODES = 2**22  #: at most


def check_video(tokenizer: Value, graphs: Value, grid: Sequence[int], vocab_size: int, bytes_of_weights: int) -> None:
    """Raise Mismatch for the first entry of a video ``tokenizer`` that does not fit the others or the weights file.

    ``bytes_of_weights``: what the numbers of the decoder take at least, in a file of that size.
    """
    t, h, w = grid
    if t == 1:
        tokenizer.refuse("an image tokenizer, because the grid has one frame")
    for name in ("decoder", FIRST, NEXT):
        graphs[name]
    config = tokenizer["config"]
    levels, widths, strides = config["levels"], config["widths"], config["strides"]
    if not 1 <= len(levels.integers(2, CODES)) <= 64 or math.prod(levels.value) != vocab_size:
        levels.refuse(f"levels whose product is the number of codes, {vocab_size}")
    tokenizer["codebook_size"].integer(vocab_size, vocab_size)
    groups = config["norm_groups"].integer(1, MOST_WIDTH)
    if not 1 <= len(widths.integers(1, MOST_WIDTH)) <= MOST_LEVELS:
        widths.refuse(f"1 to {MOST_LEVELS} levels")
    if any(width % groups for width in widths.value):
        widths.refuse(f"multiples of norm_groups, {groups}")
    time, side = 1, 1
    for stride in strides.entries(len(widths.value) - 1, len(widths.value) - 1):
        if stride.integers(1, 2, 3)[1:] != [2, 2]:
            stride.refuse("[1, 2, 2] or [2, 2, 2]")
        time, side = time * stride.value[0], 2 * side
    for name in ("res_blocks", "last_blocks"):
        config[name].integer(1, MOST_BLOCKS)
    tokenizer["downsampling"].integer(side, side)
    tokenizer["time_downsampling"].integer(time, time)
    frames = 1 + (t - 1) * time
    tokenizer["frames"].integer(frames, frames)
    if tokenizer["image_size"].integers(1, MOST_SIDE, 2) != [h * side, w * side]:
        tokenizer["image_size"].refuse(f"[{h * side}, {w * side}]: the grid times the downsampling")
    if frames * h * side * w * side > MOST_PIXELS:
        tokenizer["frames"].refuse(f"at most {MOST_PIXELS} pixels of a clip")
    numbers = sum(math.prod(shape) for shape in tensor_shapes(decoder_layers(config.value)).values())
    least = 2 * numbers + 4 * vocab_size * len(levels.value)
    if least > bytes_of_weights:
        config.refuse(f"a decoder of at most {bytes_of_weights} bytes, the whole weights file (it needs {least})")
