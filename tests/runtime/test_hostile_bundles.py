"""Manifests as an enemy made them, their hash recomputed: whatever was changed, one clear line, or a bundle that works.

The changes are drawn from a seed. A change that is refused must be refused before anything is allocated for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from hostile import Change, drop, manifest_of, put

from par_runtime.bundle import Bundle
from par_runtime.cli import inspect
from par_runtime.cost.architecture import Architecture
from par_runtime.errors import BundleError, RequestError
from par_runtime.pipeline import Pipeline

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def changes(whole: int, quick: int) -> pytest.MarkDecorator:
    """How many changes are made: ``quick``, of four entries of each table, which are read by the same lines as its
    others; among the slow tests ``whole``, of every entry.
    """
    return pytest.mark.parametrize(
        ("count", "most"), [(quick, 4), pytest.param(whole, None, marks=pytest.mark.slow)], ids=["quick", "whole"]
    )


@changes(1800, quick=150)
def test_every_entry_of_a_manifest(bundle: Path, count: int, most: int | None) -> None:
    manifest = manifest_of(bundle)
    refused, works = 0, 0
    for what, changed in hostile.mutations(manifest, count, seed=1, most=most):
        hostile.write(bundle, changed)
        try:
            opened = Bundle.open(bundle, verify="none")  # files are hashed where the bundle is loaded
        except BundleError as error:
            hostile.check_line(error)
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(what) from error
        works += 1
        Architecture.of(opened)
        assert all(line.isprintable() for line in inspect.lines(inspect.describe(opened)))
        if works % 15:
            continue
        try:
            with Pipeline.load(bundle) as pipeline:
                result = pipeline.generate([0], seed=1)
        except (BundleError, RequestError) as error:  # the self-test, for instance: its tokens were changed
            hostile.check_line(error)
        except Exception as error:
            raise AssertionError(what) from error
        else:
            assert result.images is not None
            assert result.images.shape == (1, 16, 16, 3)
    assert refused > count // 2
    assert works > count // 18


@changes(900, quick=110)
def test_every_entry_of_a_video_manifest(tiny_video: Path, tmp_path: Path, count: int, most: int | None) -> None:
    bundle = Path(shutil.copytree(tiny_video, tmp_path / "video"))
    manifest = manifest_of(bundle)
    refused, works = 0, 0
    for what, changed in hostile.mutations(manifest, count, seed=2, most=most):
        hostile.write(bundle, changed)
        try:
            opened = Bundle.open(bundle, verify="none")
            works += 1
            Architecture.of(opened)
            assert all(line.isprintable() for line in inspect.lines(inspect.describe(opened)))
            if works % 10:
                continue
            with Pipeline.load(bundle, verify="none") as pipeline:
                result = pipeline.generate([0], seed=1)
        except (BundleError, RequestError) as error:
            hostile.check_line(error)
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(what) from error
        assert result.images is not None
        assert result.images.shape == (1, 5, 16, 16, 3)
    assert refused > count // 2
    assert works > count // 23


VIDEO_CASES: list[tuple[Change, str]] = [
    (put("tokenizer/kind", "film"), "tokenizer.kind is 'film'; expected one of video"),
    (put("tokenizer/kind", None), "a video tokenizer or null, because the grid has several frames"),
    (put("tokenizer/frames", 2**40), "tokenizer.frames is 1099511627776; expected 5"),
    (put("tokenizer/frames", 6), "tokenizer.frames is 6; expected 5"),
    (put("tokenizer/time_downsampling", 0), "tokenizer.time_downsampling is 0; expected 2"),
    (put("tokenizer/downsampling", 4), "tokenizer.downsampling is 4; expected 2"),
    (put("tokenizer/image_size", [16, 32]), r"tokenizer.image_size is \[16, 32\]; expected \[16, 16\]"),
    (put("tokenizer/codebook_size", 64000), "tokenizer.codebook_size is 64000; expected 12"),
    (put("tokenizer/config/levels", [12, 1]), r"levels\[1\] is 1; expected a whole number from 2"),
    (put("tokenizer/config/levels", [4, 4]), "expected levels whose product is the number of codes, 12"),
    (put("tokenizer/config/levels", [2] * 10**5), "expected levels whose product|config.levels"),
    (put("tokenizer/config/widths", []), "expected 1 to 10 levels"),
    (put("tokenizer/config/widths", [8, 2**16]), "expected a decoder of at most|graph|weights"),
    (put("tokenizer/config/widths", [8, 15]), "expected multiples of norm_groups, 4"),
    (put("tokenizer/config/strides", []), "tokenizer.config.strides"),
    (put("tokenizer/config/strides", [[2, 2, 1]]), r"expected \[1, 2, 2\] or \[2, 2, 2\]"),
    (put("tokenizer/config/strides", [[2**31, 2, 2]]), "expected a whole number from 1 to 2"),
    (put("tokenizer/config/res_blocks", 257), "res_blocks is 257; expected a whole number from 1 to 256"),
    (put("tokenizer/config/last_blocks", 0), "last_blocks is 0; expected a whole number from 1 to 256"),
    (put("tokenizer/config/last_blocks", 256), "expected a decoder of at most"),
    (put("tokenizer/config/norm_groups", 0), "norm_groups is 0; expected a whole number from 1"),
    (put("grid", [2**40, 8, 8]), "grid"),
    (put("grid", [1, 8, 24]), "an image tokenizer, because the grid has one frame|order|phases"),
    (put("tokenizer/weights/codebook/2", 10**12), r"weights.codebook\[2\] is 1000000000000; expected"),
    (
        put("tokenizer/weights/codebook/1", [24]),
        r"weights.codebook\[1\] is \[24\]; expected \[12, 2\], which follows",
    ),
    (put("tokenizer/weights/decoder_layers.0.conv.bias/0", "int4"), "decoder_layers.0.conv.bias"),
    (put("tokenizer/weights/decoder_layers.0.conv.bias/2", 0), "overlap"),
    (drop("tokenizer/weights/decoder_layers.0.conv.bias"), "decoder_layers.0.conv.bias"),
    (
        put("tokenizer/weights/x", ["float32", [1], 0, 4]),
        "tokenizer.weights has 'x', which its decoder does not have|entries",
    ),
    (drop("graphs/decoder_next"), "has no entry 'decoder_next'|no entry 'graphs.decoder_next'|decoder_next"),
    (drop("tokenizer/frames"), "frames"),
]


@pytest.mark.parametrize(("change", "message"), VIDEO_CASES, ids=range(len(VIDEO_CASES)))
def test_a_video_manifest_that_was_changed_says_what_does_not_fit(
    tiny_video: Path, tmp_path: Path, change: Change, message: str
) -> None:
    bundle = Path(shutil.copytree(tiny_video, tmp_path / "video"))
    manifest = manifest_of(bundle)
    change(manifest)
    hostile.write(bundle, hostile.sealed(manifest))
    with pytest.raises(BundleError, match=message) as raised:
        Bundle.open(bundle)
    hostile.check_line(raised.value)


CHILD = """
import json, resource, sys
from pathlib import Path
import hostile
from par_runtime.bundle import Bundle
from par_runtime.errors import BundleError, RequestError
from par_runtime.pipeline import Pipeline
from par_runtime.system import peak_bytes
bundle, count = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
manifest = json.loads((bundle / "manifest.json").read_text())
loaded = 0
for what, changed in hostile.mutations(manifest, count, seed=3, most=int(sys.argv[3]) or None):
    print(what, file=sys.stderr, flush=True)  # the last line is what killed it
    if loaded % 2:  # an older bundle: the sizes of a model are checked against the file alone
        changed = hostile.sealed({k: v for k, v in changed.items() if k != "weights"})
    hostile.write(bundle, changed)
    try:
        Bundle.open(bundle, verify="none")
        loaded += 1
        if loaded % 8 < 2:
            with Pipeline.load(bundle, threads=1, verify="none") as pipeline:
                pipeline.generate([0, 1], seed=1)
    except (BundleError, RequestError) as error:
        assert len(str(error)) < 1000
print(loaded, peak_bytes())
"""


@pytest.mark.parametrize(
    ("name", "count", "most"),
    [("tiny", 100, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("demo", 80, 4), ("tiny", 500, 0)))],
)
def test_no_change_kills_the_process_or_takes_a_gigabyte(
    bundle: Path, tmp_path: Path, name: str, count: int, most: int
) -> None:
    """In the quick ones of four entries of each table, which are read by the same lines as its others."""
    path = bundle if name == "tiny" else Path(shutil.copytree(DEMO, tmp_path / "demo"))
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(count), str(most)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": here},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, peak = map(int, done.stdout.split())
    assert loaded > count // 10
    assert peak < 2**30


CASES: list[tuple[Change, str]] = [
    (put("model/n_layers", 10**18), "model.n_layers is 1000000000000000000; expected a whole number from 1 to 16384"),
    (put("model/n_layers", 3), "model needs at least 21248 bytes|no entry 'layers.2.attention_norm' in weights"),
    (put("model/n_layers", True), "model.n_layers is True; expected a whole number"),
    (put("model/dim", 10**99), "model.dim is an integer of about 100 digits; expected a whole number"),
    (put("model/head_dim_padded", 16), r"weights.cos\[1\] is \[64, 4\]; expected \[64, 8\], which follows"),
    (put("model/head_dim", 7), "model.dim is 16; expected n_heads times head_dim, 14"),
    (put("model/vocab_size", 65), r"weights.output\[1\] is \[16, 64\]; expected \[16, 65\]"),
    (put("model/n_classes", 8), r"weights.embed\[1\] is \[74, 16\]; expected \[73 or more, 16\]|class_names"),
    (put("model/n_classes", 20), r"weights.embed\[1\] is \[74, 16\]; expected \[85 or more, 16\]"),
    (put("weights/output/2", 10**12), r"weights.output\[2\] is 1000000000000; expected 2048 bytes inside weights.data"),
    (put("weights/output/2", -2), r"weights.output\[2\] is -2; expected a whole number from 0"),
    (put("weights/output/2", 0), "weights 'embed' and 'output' overlap|weights 'output' and 'embed' overlap"),
    (put("weights/output/2", 159567), r"weights.output\[2\] is 159567; expected 2048 bytes inside weights.data"),
    (put("weights/output/3", 10**9), r"weights.output\[3\] is 1000000000; expected 2048 bytes, as a float16 of shape"),
    (put("weights/output/1", [16, -64]), r"weights.output\[1\]\[1\] is -64; expected a whole number"),
    (put("weights/output/1", [2**32] * 8), r"weights.output\[3\] is 2048; expected \d+ bytes, as a float16"),
    (put("weights/output/1", [64, 16]), r"weights.output\[1\] is \[64, 16\]; expected \[16, 64\]"),
    (put("weights/output/0", "float64"), r"weights.output\[0\] is 'float64'; expected one of float32, float16"),
    (put("weights/norm/0", "int8"), r"weights.norm\[3\] is 32; expected 16 bytes, as a int8"),
    (put("weights/cos/2", 2369), r"weights.cos\[2\] is 2369; expected a multiple of 4"),
    (put("weights/layers.1.w2", []), r"weights.layers.1.w2 is \[\]; expected a list of 4 entries \(it has 0\)"),
    (put("weights", [1]), r"weights is \[1\]; expected an object"),
    (put("files/weights.data/bytes", 10**18), "bytes is 1000000000000000000; expected a whole number"),
    (put("files/step.onnx/bytes", 2**23), "bytes is 8388608; expected at most 4194304 bytes of a graph"),
    (put("files/weights.data/sha256", "../../x"), "sha256 is '../../x'; expected 64 hexadecimal digits"),
    (put("files", {}), "no entry 'weights.data' in files"),
    (put("graphs/step/file", "/etc/passwd"), "file '/etc/passwd' is not one of the bundle's own"),
    (put("graphs/step/file", "a\nb"), r"holds the text 'a\\nb'"),
    (put("graphs/step/file", "weights.data"), "file 'weights.data' is not one of the bundle's own"),
    (lambda m: m["graphs"].pop("group"), "no entry 'group' in graphs"),
    (lambda m: m["graphs"].pop("decoder"), "no entry 'decoder' in graphs"),
    (put("phases/3/repeat", 10**18), "repeat is 1000000000000000000; expected a whole number"),
    (put("phases/2/inputs/1", 74), r"phases\[2\].inputs\[1\] is 74; expected a whole number from 0 to 73"),
    (put("phases/2/inputs/1", -1), r"phases\[2\].inputs\[1\] is -1"),
    (put("phases/0/inputs/0", "token"), "expected a first phase that takes the class"),
    (put("phases/1/name", "prefill"), "expected phases of different names"),
    (put("group_size", 2), r"phases\[2\].query is 4; expected a whole number from 1 to 2"),
    (put("ids/class_base", 69), "ids.class_base is 69; expected a whole number from 0 to 68"),
    (put("ids/no_class", 74), "ids.no_class is 74; expected a whole number from 0 to 73"),
    (put("order/5", "x"), r"order\[5\] is 'x'; expected a whole number"),
    (put("grid", [1, 8]), r"grid is \[1, 8\]; expected a list of 2|expected a list of 3 entries"),
    (put("cache/inputs/1", "past_k.0"), "expected names that differ"),
    (lambda m: m["cache"]["outputs"].pop(), r"cache.outputs is .*; expected a list of 4 entries \(it has 3\)"),
    (put("cache/heads", 4), "cache.heads is 4; expected 2"),
    (put("cache/head_dim", 2**40), "cache.head_dim is 1099511627776; expected 8"),
    (put("cache/dtype", "object"), "cache.dtype is 'object'; expected one of float32"),
    (put("tokenizer/image_size", [10**6, 16]), r"tokenizer.image_size\[0\] is 1000000; expected"),
    (put("tokenizer/image_size", [16, 32]), r"tokenizer.image_size is \[16, 32\]; expected \[16, 16\]: the grid times"),
    (put("tokenizer/config/channels", 60_000), "tokenizer needs at least .* bytes of weights; weights.data has 159568"),
    (put("class_names", ["x"] * 5), r"class_names is .*; expected a list of 6 entries \(it has 5\)"),
    (put("class_names/2", "\x1b[2Jotter"), r"holds the text '\\x1b\[2Jotter'"),
    (put("class_names/2", "\u202eretto"), r"holds the text '\\u202eretto'"),
    (put("class_names/2", 7), r"class_names\[2\] is 7; expected a text of 1 to 1000"),
    (put("name", "x" * 10**7), r"100\d{5} bytes; expected at most 8388608"),
    (put("name", "x" * 10**6), "holds the text 'xxx.*"),
    (put("name", "\ud800"), "not valid JSON"),
    (put("defaults/guidance", 1e300), "defaults.guidance is 1e\\+300; expected a number from 0 to 1e\\+20"),
    (put("defaults/top_k", 2.5), "defaults.top_k is 2.5; expected a whole number from 0"),
    (put("defaults/top_p", -1), "defaults.top_p is -1; expected a number from 0 to 1"),
    (put("defaults/guidance_interval", -2), "defaults.guidance_interval is -2; expected a whole number from -1"),
    (
        put("defaults/colour", 1),
        "defaults has 'colour', which this parvis does not know; install a newer parvis",
    ),
    (put("tokenizer/weights/codebook/0", "int8"), r"weights.codebook\[0\] is 'int8'; expected one of float32"),
    (put("tokenizer/weights/codebook/1", [32, 8]), r"weights.codebook\[1\] is \[32, 8\]; expected \[64, 4\], which"),
    (put("tokenizer/weights/codebook/2", 0), r"weights 'codebook' and .* overlap|weights .* and 'codebook' overlap"),
    (put("tokenizer/weights/codebook/2", 2**40), r"codebook\[2\] is 1099511627776; expected 512 bytes inside"),
    (put("tokenizer/weights/codebook/2", 1), r"codebook\[2\] is 1; expected a multiple of 2"),
    (put("tokenizer/weights/codebook/3", 511), r"codebook\[3\] is 511; expected 512 bytes, as a float16 of shape"),
    (put("tokenizer/weights/x", ["float16", [1], 0, 2]), r"tokenizer.weights is .* expected an object of at most \d+"),
    (
        lambda m: m["tokenizer"]["weights"].pop("post_quant_conv.bias"),
        "no entry 'post_quant_conv.bias' in tokenizer.weights",
    ),
    (put("tokenizer/weights", []), "no entry 'codebook' in tokenizer.weights|expected an object"),
    (put("tokenizer/config/norm_groups", 3), "config.norm_groups is 3; expected a divisor of the channels of each"),
    (put("selftest/labels/0", 6), r"selftest.labels\[0\] is 6; expected a whole number from 0 to 5"),
    (put("selftest/tokens/0/3", 64), r"selftest.tokens\[0\]\[3\] is 64; expected a whole number from 0 to 63"),
    (put("selftest/tokens/0", [1]), r"selftest.tokens\[0\] is \[1\]; expected a list of 64 entries"),
    (put("precision", "fp8"), "precision is 'fp8'; expected one of fp32"),
    (put("parity", []), r"parity is \[\]; expected an object"),
    (put("parity/x\x07", 1), r"holds the text 'x\\x07'"),
    (put("schema", True), "has no schema number"),
    (put("schema", 10**90), "schema an integer of about 91 digits was made by a newer parvis"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=range(len(CASES)))
def test_what_a_changed_manifest_is_told(bundle: Path, change: Change, message: str) -> None:
    hostile.check_refused(bundle, change, message)
