"""Images in another size: the published way, which PyTorch has too."""

from __future__ import annotations

import numpy as np
import pytest

from par_runtime.samples.resize import bicubic, weights

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("old", "new"), [(384, 256), (64, 48), (16, 40), (5, 2), (3, 7), (2, 1)])
def test_weights_are_those_of_pytorch(old: int, new: int) -> None:
    images = torch.eye(old)[None, None]  # pixel i of a line alone, for each i
    expected = torch.nn.functional.interpolate(images, size=(new, old), mode="bicubic")[0, 0]
    assert np.allclose(weights(old, new), expected.numpy(), atol=1e-5)
    assert np.allclose(weights(old, new).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("before", "size"), [((384, 384), (256, 256)), ((24, 36), (16, 20)), ((8, 6), (12, 9))])
def test_within_two_grey_levels_of_the_published_way_and_the_same_on_average(
    before: tuple[int, int], size: tuple[int, int]
) -> None:
    """The published way resizes what the decoder gives, and makes whole grey levels of that."""
    torch.manual_seed(1)
    rough = torch.rand(2, 3, before[0] // 4 + 1, before[1] // 4 + 1) * 2 - 1
    pixels = torch.nn.functional.interpolate(rough, size=before, mode="bilinear")  # as a decoder's, inside of -1 .. 1
    published = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic")
    wanted = (127.5 * published + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy().astype(int)
    given = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    made = bicubic(given, size)
    assert (made.shape, made.dtype) == ((2, *size, 3), np.uint8)
    difference = made - wanted
    assert np.abs(difference).max() <= 2
    assert abs(difference.mean()) < 0.05
    assert np.abs(difference).mean() < 0.5


def test_edges_stay_within_what_a_pixel_can_hold() -> None:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :, 4:] = 255  # bicubic swings beyond both
    made = bicubic(image, (12, 12))
    assert (made.min(), made.max()) == (0, 255)
    assert (made[0, :, :4] < 10).all()
    assert (made[0, :, 8:] > 245).all()


def test_frames_of_clips_and_images_of_the_same_size() -> None:
    clips = np.random.default_rng(1).integers(256, size=(2, 3, 8, 8, 3), dtype=np.uint8)
    made = bicubic(clips, (4, 6))
    assert made.shape == (2, 3, 4, 6, 3)
    assert np.array_equal(made[1, 2], bicubic(clips[1, 2], (4, 6)))
    assert bicubic(clips, (8, 8)) is clips
