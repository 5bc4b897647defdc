"""Arguments that look right and are not: masked arrays, huge views, functions that never run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from par_runtime import Pipeline, RequestError
from par_runtime.arguments import as_index, check_returned, function, given, plain

Get = Callable[[str], Pipeline]


@pytest.fixture
def pipeline(shared_pipelines: Get) -> Pipeline:
    return shared_pipelines("C step, threads")


def masked(values: Any) -> Any:
    return np.ma.array(values, mask=np.arange(np.size(values)).reshape(np.shape(values)) == 0)


def test_what_is_masked_is_not_taken_for_what_lies_below(pipeline: Pipeline) -> None:
    result = pipeline.generate([0, 1], seed=1)
    keep = np.zeros(pipeline.bundle.grid[1:], bool)
    image, tokens = result.images[0], result.tokens  # type: ignore[index]
    for name, work in {
        "tokens": lambda: pipeline.decode(masked(tokens)),
        "keep": lambda: pipeline.generate(0, seed=1, keep=masked(keep), tokens=tokens[0]),
        "images": lambda: pipeline.encode(masked(image)),
        "picture": lambda: pipeline.keep_mask(change="left", photo=masked(image)),
        "region": lambda: pipeline.keep_mask(change=masked(np.ones(image.shape[:2], bool))),
        "labels": lambda: pipeline.generate(masked([1, 2]), seed=1),
        "seeds": lambda: pipeline.generate([1, 2], seeds=masked([1, 2])),
        "guidance": lambda: pipeline.generate([1, 2], guidance=masked([1, 2])),
    }.items():
        with pytest.raises(RequestError, match=rf"^{name}: a masked array, some of whose .* array\.filled\(VALUE\)"):
            work()
    with pytest.raises(RequestError, match=r"^images: a masked array"):
        pipeline.encode([image, masked(image)])
    nothing_masked = np.ma.array(tokens, mask=False)
    np.testing.assert_array_equal(pipeline.decode(nothing_masked), result.images)


def test_a_view_of_one_number_is_not_made_a_list(pipeline: Pipeline) -> None:
    """It takes no memory, and what it says it has takes 80 GB."""
    huge, tokens = np.broadcast_to(np.int64(0), (10**10,)), np.zeros(pipeline.bundle.n_tokens, int)
    for name, work in {
        "labels": lambda: pipeline.generate(huge),
        "seeds": lambda: pipeline.generate(0, seeds=huge),
        "guidance": lambda: pipeline.generate(0, guidance=huge),  # type: ignore[arg-type]
        "settings": lambda: pipeline.generate(0, settings=huge),  # type: ignore[arg-type]
        "indices": lambda: pipeline.generate(0, seed=1).to_bytes(indices=huge),
    }.items():
        with pytest.raises(RequestError, match=rf"^{name}: an array of shape \(10000000000,\); expected at most one"):
            work()
    with pytest.raises(RequestError, match=r"^labels: an array of shape \(400, 64, 64, 3\)"):
        pipeline.generate(np.zeros((400, 64, 64, 3), np.uint8))
    with pytest.raises(RequestError, match=r"^tokens: 100000000 entries; expected at most 1048576"):
        pipeline.decode(np.broadcast_to(tokens, (10**8, len(tokens))))
    with pytest.raises(RequestError, match=r"^more than 1048576 pictures"):
        pipeline.encode(np.broadcast_to(np.uint8(0), (10**7, 7, 7, 3)))
    for name in ("seed", "temperature", "greedy"):
        with pytest.raises(RequestError, match=rf"^{name}(:| array)"):
            pipeline.generate(0, **{name: huge})
    assert plain(huge) is huge


class Tensor:
    """As PyTorch's: one number, or none on the device "meta", where each way to it fails."""

    def __init__(self, number: int | None, dtype: str = "torch.int64", shape: tuple[int, ...] = ()) -> None:
        self._number, self.dtype, self.shape, self.ndim = number, dtype, shape, len(shape)

    def item(self) -> int:
        if self._number is None or self.shape:
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")
        return self._number

    tolist = __index__ = item

    def __iter__(self) -> Any:
        if not self.shape:
            raise TypeError("iteration over a 0-d tensor")
        return iter([Tensor(self._number, self.dtype, self.shape[1:])] * self.shape[0])

    def __repr__(self) -> str:
        return f"tensor({'...' if self._number is None else self._number})"


def test_tensors_without_numbers_are_refused(pipeline: Pipeline) -> None:
    meta, true = Tensor(None), Tensor(True, "torch.bool")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": meta}, "label tensor"),
        ({"labels": Tensor(None, shape=(2,))}, "label tensor"),
        ({"labels": 0, "seed": meta}, "seed tensor"),
        ({"labels": 0, "guidance": meta}, "guidance tensor"),
        ({"labels": 0, "seed": true}, "seed True: expected a whole number"),
        ({"labels": true}, "label True: expected a class index"),
        ({"labels": np.array(True)}, "label True: expected a class index"),
    ]
    for arguments, message in cases:
        with pytest.raises(RequestError, match=f"^{message}"):
            pipeline.generate(**arguments)
    assert as_index(Tensor(3)) == 3
    assert given(meta) == "tensor(...)"


def test_a_matrix_is_a_region_as_an_array_is(pipeline: Pipeline) -> None:
    pixels = np.zeros(pipeline.bundle.image_size, bool)  # type: ignore[arg-type]
    pixels[:, :8] = True
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(pixels)
    np.testing.assert_array_equal(pipeline.keep_mask(change=matrix), pipeline.keep_mask(change=pixels))


# -- functions --------------------------------------------------------------------------------------------------------


def yields(*_: object) -> Any:
    yield


async def yields_later(*_: object) -> Any:
    yield


async def later(*_: object) -> None: ...


class Yields:
    def __call__(self, *_: object) -> Any:
        yield


@pytest.mark.parametrize("bad", [yields, yields_later, later, partial(yields, 1), Yields(), Yields().__call__])
def test_a_function_that_would_never_run_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"^on_step .*: expected a plain function, not (a generator|an async one)"):
        function("on_step", bad)
    function("on_step", print)


@pytest.mark.parametrize("hidden", [yields, yields_later, later])
def test_what_a_function_returns_is_looked_at(pipeline: Pipeline, hidden: Callable[..., Any]) -> None:
    calls = []

    def called(*arguments: object) -> Any:
        calls.append(arguments)
        return hidden(*arguments)

    for how in ({"on_step": called}, {"on_preview": called, "preview_every": 1}):
        with pytest.raises(RequestError, match=r"^on_(step|preview) .*: expected a plain function, not a"):
            pipeline.generate(0, seed=1, **how)  # type: ignore[arg-type]
    assert len(calls) == 2
    check_returned("on_step", called, 5)
