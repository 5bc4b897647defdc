"""The memory that a batch needs, in bytes: the weights of the step network, and the key-value cache."""

from __future__ import annotations

from collections.abc import Mapping

from par_runtime.cost.architecture import Architecture

#: Batch sizes of :func:`memory_table`.
BATCHES = (1, 2, 4, 8)


def cache_bytes(architecture: Architecture, images: int, guided: bool, number_bytes: float) -> float:
    """The key-value cache of a batch, of which a guided image takes two rows. ``number_bytes``: of one number of it."""
    rows = images * (2 if guided else 1)
    return rows * architecture.cache_numbers * architecture.n_tokens * number_bytes


def memory_bytes(architecture: Architecture, images: int, weight_bytes: float, number_bytes: float) -> int:
    """Weights and cache of a guided batch; the embedding table, activations and the decoder are not counted.

    ``weight_bytes``: of one parameter, ``number_bytes``: of one number of the cache.
    """
    return int(architecture.step_parameters * weight_bytes + cache_bytes(architecture, images, True, number_bytes))


def memory_table(architecture: Architecture, sizes: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, int]]:
    """:func:`memory_bytes` by number of images (as text, for JSON) and by the names of ``sizes``.

    ``sizes``: name -> bytes of one parameter, and of one number of the cache.
    """
    return {
        str(images): {name: memory_bytes(architecture, images, *size) for name, size in sizes.items()}
        for images in BATCHES
    }
