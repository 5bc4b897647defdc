"""NVIDIA's Polygraphy as an independent judge: it runs a bundle's files itself, and our backend must agree.

Of Polygraphy 0.53.6: ``CompareFunc.simple`` warns that it is deprecated, ``SimpleCompareFunc`` is its new name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, SimpleCompareFunc

from par_runtime.pipeline import Pipeline
from par_runtime.request import image_settings
from par_runtime.schedule import Schedule

Feed = dict[str, np.ndarray]


class Ours(BaseRunner):
    """A function of our backend as Polygraphy sees a runner."""

    def __init__(self, feed: Feed, output: str, infer: Callable[[Feed], np.ndarray]) -> None:
        super().__init__(name="parvis")
        self.feed, self.output, self.function = feed, output, infer

    def activate_impl(self) -> None:
        pass

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, array in self.feed.items():
            metadata.add(name, array.dtype, array.shape)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        self.inference_time = 0.0  # the base class asks for it
        return OrderedDict({self.output: self.function(feed_dict)})

    def deactivate_impl(self) -> None:
        pass


def agrees(file: Path, feed: Feed, output: str, infer: Callable[[Feed], np.ndarray], atol: float) -> bool:
    """Whether Polygraphy finds ``output`` of ``file`` and of ``infer`` within ``atol``, and no NaN."""
    runners = [
        OnnxrtRunner(SessionFromOnnx(str(file), providers=["cpu"]), name="polygraphy"),
        Ours(feed, output, infer),
    ]
    results = Comparator.run(runners, data_loader=[feed])
    assert Comparator.validate(results, check_nan=True, check_inf=True)
    compared = Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=atol, rtol=0.0))
    assert compared.output_names() == [output]  # something was compared
    return bool(compared)


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return Pipeline.load(tiny, "cpu", selftest=False)


# Polygraphy divides by the values it compares for its relative error, of which black pixels have none.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered in divide:RuntimeWarning")
def test_the_decoder_gives_the_images_that_polygraphy_gets(tiny: Path, pipeline: Pipeline) -> None:
    tokens = np.random.default_rng(0).integers(pipeline.bundle.vocab_size, size=(3, pipeline.bundle.n_tokens))
    feed = {"tokens": tokens}

    def one_off(fed: Feed) -> np.ndarray:
        images = pipeline.decode(fed["tokens"]).copy()
        images[2, 5, 5, 1] ^= 1  # one grey level of one value
        return images

    assert agrees(tiny / "decoder.onnx", feed, "images", lambda fed: pipeline.decode(fed["tokens"]), 0)
    assert not agrees(tiny / "decoder.onnx", feed, "images", one_off, 0)


def test_the_first_call_gives_the_logits_that_polygraphy_gets(tiny: Path, pipeline: Pipeline) -> None:
    """The step graph with inputs written by hand: guided, of two images, on an empty cache of another length."""
    graph = pipeline.bundle.graphs["step_opset23"]  # every supported ONNX Runtime runs it
    schedule = Schedule.of(pipeline.bundle, [4, 1], image_settings(pipeline.bundle, 2, guidance=2.5))
    _, batch, ids, write = next(schedule.walk(np.zeros((2, pipeline.bundle.n_tokens), np.int64)))
    layout = pipeline.bundle.cache
    feed = {
        "ids": ids,
        "positions": np.zeros((4, 1), np.int64),
        "write": np.zeros(4, np.int64),
        "length": np.ones(4, np.int64),
        "cond_row": np.array([0, 1]),
        "uncond_row": np.array([2, 3]),
        "uniform": np.zeros((2, 1), np.float32),
        "guidance": np.full(2, 2.5, np.float32),
        "temperature": np.ones(2, np.float32),
        "top_k": np.zeros(2, np.int64),
        "top_p": np.ones(2, np.float32),
    }
    feed |= {name: np.zeros((4, layout.heads, 5, layout.head_dim), np.float32) for name in layout.inputs}

    def ours(factor: float) -> Callable[[Feed], np.ndarray]:
        return lambda fed: pipeline.backend.logits(batch, fed["ids"], write) * np.float32(factor)

    assert agrees(tiny / graph.file, feed, "logits", ours(1.0), 1e-4)
    assert not agrees(tiny / graph.file, feed, "logits", ours(1.001), 1e-4)
