"""The schema of ``manifest.json``: the form of every entry, the sizes against each other and against the files.

``check`` is the only gate between a manifest, which anybody can have written, and everything that allocates, maps or
calls C by its numbers. What it lets through has these properties:

- No number is larger than what the bundle's files bear out: widths and layers fit into ``weights.data``, the number of
  tokens is the length of ``order``.
- Every tensor that a backend reads is in the table of weights, in the shape that follows from the model, inside the
  file, in a place of its own. A quantised matrix has scales beside it, in the shape that follows from its group.
- Every id that a call can be fed is a row of the embedding table.
- Every text can be printed.

Entries that this version does not know are ignored, because their absence could not be noticed either; a change of
meaning has another schema number. In ``defaults`` they are refused: there an unknown one would change images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from par_runtime.checked import MOST_NESTED, UNPRINTABLE, Mismatch, Value, shown
from par_runtime.dtypes import (
    ARITHMETICS,
    BYTES,
    CACHES,
    DECODER_PRECISIONS,
    DTYPE,
    FLOAT32_MAX,
    MOST_GUIDANCE,
    STORAGE,
    dtype_bytes,
)
from par_runtime.manifest_video import VIDEO, check_video
from par_runtime.places import WEIGHTS, check_overlaps, check_place
from par_runtime.quantised import GROUPS, MOST_CODE, SCALE
from par_runtime.tokenizer_shapes import decoder_shapes
from par_runtime.video_shapes import decoder_shapes as clip_decoder_shapes

#: What is read of a manifest at most. Those that are written have tens of kilobytes, with 48 layers some hundreds.
MOST_BYTES = 8 * 2**20
#: ONNX files hold no weights: those that are written have up to some hundred kilobytes. ONNX Runtime takes 200 bytes of
#: memory for each byte, measured on a chain of small operators.
MOST_GRAPH_BYTES = 4 * 2**20
MOST_FILES = 32  #: hashed together in a few seconds
MOST_TEXT, MOST_NAME, MOST_CLASS_NAME = 4096, 200, 1000  #: characters of any text, of a name, of a class's names
MOST_CLASS_NAMES = 2**20  #: characters of all; a label is compared with each name
GRAPHS = ("step", "group")  #: that every bundle has; others are asked for by whoever needs them
MATRICES = ("wqkv", "wo", "w13", "w2")  #: of a layer
NORMS = ("attention_norm", "ffn_norm")  #: of a layer
#: dtype -> bytes of a number in the weights file. Quantised matrices have scales beside them.
FLOAT_BYTES = {name: float(dtype_bytes(name)) for name in STORAGE}
STORED_BYTES = FLOAT_BYTES | {"int8": 1.0, "int4": 0.5}
KEPT = "kept"  #: what a calibration says of weights that it did not quantise
#: dtypes of the inputs and outputs of graphs
IO_DTYPES = (*STORAGE, "int64", "int32", "uint8", "bool")
#: Numbers that a batch of one guided image may allocate: four times what a 3B model at 1024 pixels takes.
MOST_CACHE_NUMBERS = 4 * 2**30
MOST_LOGITS = 2**26  #: of one row of a call


def check(manifest: Any) -> None:
    """Raise Mismatch for the first entry of a manifest of the current schema that is not as this module says."""
    m = Value(manifest)
    check_texts(manifest)
    m["name"].text(MOST_NAME)
    m["hash"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    m["precision"].one_of(DTYPE)
    sizes = _check_model(m["model"])
    n_tokens = _check_tokens(m)
    files = _check_files(m["files"], m["graphs"])
    quantised, group = _check_calibration(m)
    rows = _check_weights(m, sizes, n_tokens, files)
    _check_quantised(m, sizes["n_layers"], quantised, group)
    _check_ids(m["ids"], sizes["n_classes"], rows)
    _check_phases(m, sizes["vocab_size"], n_tokens, rows)
    _check_cache(m["cache"], sizes, n_tokens)
    _check_tokenizer(m, sizes["vocab_size"], files)
    for name in ("class_names", "class_synsets"):
        if m.value.get(name):
            _check_class_names(m[name], sizes["n_classes"])
    m["class_names"]
    check_defaults(m["defaults"])
    _check_selftest(m["selftest"], sizes, n_tokens)
    m["parity"].object()


def check_defaults(d: Value) -> None:
    """The sampling settings of requests that give none: the ranges that ``request.py`` accepts."""
    d["guidance"].number(0, MOST_GUIDANCE)
    d["temperature"].number(0, FLOAT32_MAX)
    d["top_k"].integer()
    d["top_p"].number(0, 1)
    if "guidance_interval" in d.value:
        d["guidance_interval"].integer(-1)
    unknown = sorted(d.value.keys() - {"guidance", "temperature", "top_k", "top_p", "guidance_interval"})
    if unknown:
        raise Mismatch(
            f"defaults has {shown(unknown[0])}, which this parvis does not know; install a newer parvis "
            "(docs/install.md)"
        )


def check_texts(value: Any) -> None:
    """Every text, also in entries that nobody reads: names and values end up in messages and in ``parvis inspect``."""
    level = [value]
    for _ in range(MOST_NESTED + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.keys()
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and (len(each) > MOST_TEXT or UNPRINTABLE.search(each)):
                raise Mismatch(f"holds the text {shown(each)}; expected at most {MOST_TEXT} printable characters")
        level = inner


def _check_model(m: Value) -> dict[str, int]:
    sizes = {
        "dim": m["dim"].integer(1, 2**20),
        "n_layers": m["n_layers"].integer(1, 2**14),
        "n_heads": m["n_heads"].integer(1, 2**14),
        "head_dim": m["head_dim"].integer(2, 2**14),
        "head_dim_padded": m["head_dim_padded"].integer(2, 2**14),
        "ffn_dim": m["ffn_dim"].integer(1, 2**22),
        "vocab_size": m["vocab_size"].integer(1, 2**22),
        "n_classes": m["n_classes"].integer(1, 2**17),  # an unknown label is compared with all names
        "parameters": m["parameters"].integer(),
    }
    if sizes["n_heads"] * sizes["head_dim"] != sizes["dim"]:
        m["dim"].refuse(f"n_heads times head_dim, {sizes['n_heads'] * sizes['head_dim']}")
    if sizes["head_dim"] % 2 or sizes["head_dim_padded"] % 2:
        m["head_dim"].refuse("an even number, and an even head_dim_padded")
    if not sizes["head_dim"] <= sizes["head_dim_padded"] < sizes["head_dim"] + 64:
        m["head_dim_padded"].refuse(f"head_dim {sizes['head_dim']}, or a little more")
    return sizes


def _check_tokens(m: Value) -> int:
    """grid, n_tokens, order, and that the phases cover the tokens; returns N."""
    t, h, w = m["grid"].integers(1, 2**20, 3)
    count = m["n_tokens"].integer(1, 2**24)
    calls = _calls(m["phases"])
    if (
        t * h * w != count
        or sum(query * repeat for query, repeat in calls) != count
        or sorted(m["order"].integers(0, 2**53)) != list(range(count))
    ):
        raise Mismatch(f"order and phases do not cover the {t}x{h}x{w} tokens once")
    return count


def _calls(phases: Value) -> list[tuple[int, int]]:
    """(query, repeat) of each phase; checks that each starts where the one before it ended."""
    position, calls = 0, []
    for phase in phases.entries(1, 16):
        name = phase["name"].match("[a-z_]{1,32}", "1 to 32 small letters")
        query, repeat = phase["query"].integer(1, 2**20), phase["repeat"].integer(1, 2**24)
        phase["inputs"].entries()
        if phase["start"].integer() != position or len(phase["inputs"].value) != query:
            raise Mismatch(f"phase {name!r} does not continue at position {position}")
        position += query * repeat
        calls.append((query, repeat))
    return calls


def _check_phases(m: Value, vocab_size: int, n_tokens: int, rows: int) -> None:
    """What the calls are fed, and how much they take; ``_calls`` has checked the form."""
    largest = m["group_size"].integer(1, n_tokens)
    if largest * vocab_size > MOST_LOGITS:
        m["group_size"].refuse(f"at most {MOST_LOGITS} logits of a call, group_size times vocab_size")
    names = [phase["name"].value for phase in m["phases"].entries()]
    if len(set(names)) != len(names):
        m["phases"].refuse("phases of different names")
    if "class" not in m["phases"].value[0]["inputs"]:
        m["phases"].refuse("a first phase that takes the class")
    for phase in m["phases"].entries():
        phase["query"].integer(1, largest)
        for entry in phase["inputs"].entries():
            if entry.value not in ("class", "token"):
                entry.integer(0, rows - 1)
        if phase["inputs"].value.count("token") > phase["start"].value:
            phase["inputs"].refuse(f"no more tokens than there are before the phase, {phase['start'].value}")


def _check_files(files: Value, graphs: Value) -> Mapping[str, int]:
    """Names, sizes and hashes; every graph is one of the files. Returns the bytes of each file."""
    sizes = {}
    for name, entry in files.items(MOST_FILES):
        Value(name, "files").file_name("bundle")
        entry["sha256"].match("[0-9a-f]{64}", "64 hexadecimal digits")
        sizes[name] = entry["bytes"].integer(0, 2**50)
    if WEIGHTS not in sizes:
        raise Mismatch(f"no entry {WEIGHTS!r} in files")
    for name, graph in graphs.items(MOST_FILES):
        file = graph["file"].file_name("bundle")
        if file not in sizes or file == WEIGHTS:
            raise Mismatch(f"file {shown(file)} is not one of the bundle's own")
        if sizes[file] > MOST_GRAPH_BYTES:
            files[file]["bytes"].refuse(f"at most {MOST_GRAPH_BYTES} bytes of a graph")
        graph["opset"].integer(1, 1000)
        graph["sampling"]
        if graph.get("sampling") is not None:
            graph["sampling"].match("[a-z]{1,32}", "a kind of sampling, or null")
        for side in ("inputs", "outputs"):  # described for readers; a session is compared with what follows from sizes
            for tensor in graph[side].entries(0, 2**16) if side in graph.value else ():
                tensor["name"].text()
                tensor["dtype"].one_of(IO_DTYPES)
                for size in tensor["shape"].entries(0, 8):
                    if not isinstance(size.value, str):
                        size.integer(1)
        Value(name, "a name in graphs").text(64)
    for name in GRAPHS:
        graphs[name]
    return sizes


def step_shapes(s: Mapping[str, int], n_tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the step network of a ``model`` of these sizes.

    The embedding table is left out: bundles may share one with more rows than they need.
    """
    dim, inner, ffn = s["dim"], s["n_heads"] * s["head_dim_padded"], s["ffn_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "cos": (n_tokens, s["head_dim_padded"] // 2),
        "sin": (n_tokens, s["head_dim_padded"] // 2),
        "norm": (dim,),
        "output": (dim, s["vocab_size"]),
    }
    layer = {
        **dict.fromkeys(NORMS, (dim,)),
        **dict(zip(MATRICES, ((dim, 3 * inner), (inner, dim), (dim, 2 * ffn), (ffn, dim)), strict=True)),
    }
    for i in range(s["n_layers"]):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _check_weights(m: Value, s: Mapping[str, int], n_tokens: int, files: Mapping[str, int]) -> int:
    """The table of weights against the model and the file; returns how many rows the embedding table has."""
    size = files[WEIGHTS]
    inner = s["n_heads"] * s["head_dim_padded"]
    numbers = s["n_layers"] * (4 * s["dim"] * inner + 3 * s["dim"] * s["ffn_dim"]) + s["dim"] * s["vocab_size"]
    if numbers * min(BYTES.values()) > size:
        raise Mismatch(
            f"model needs at least {int(numbers * min(BYTES.values()))} bytes of weights; {WEIGHTS} has {size}"
        )
    least = s["vocab_size"] + s["n_classes"] + 1
    if m.get("weights") is None or not m.value["weights"]:  # an older bundle; only ONNX Runtime can run it
        return least + m["group_size"].integer(1, n_tokens) - 1
    places = []
    shapes = step_shapes(s, n_tokens)
    for name, entry in m["weights"].items(2**18):
        dtype, shape, offset, length = check_place(entry, size, STORED_BYTES)
        sizes = tuple(shape.value)
        if name in shapes and sizes != shapes[name]:
            shape.refuse(f"{shown(list(shapes[name]))}, which follows from the model")
        if name == "embed" and (len(sizes) != 2 or sizes[0] < least or sizes[1] != s["dim"]):
            shape.refuse(f"[{least} or more, {s['dim']}]")
        if name not in shapes or not name.endswith((*MATRICES, "output")):
            dtype.one_of(STORAGE)  # only matrices are quantised
        places.append((offset.value, length.value, name))
    for name in ("embed", *shapes):
        m["weights"][name]
    check_overlaps(places)
    rows: int = m["weights"]["embed"].value[1][0]
    return rows


def _check_calibration(m: Value) -> tuple[str, int]:
    """What ``parvis calibrate`` has changed: the dtype of quantised matrices ("kept": there are none), their group."""
    if m.get("calibration") is None:
        return KEPT, 0
    c = m["calibration"]
    weights = c["weights"].one_of((KEPT, *MOST_CODE))
    group = c["group"].integer(0)
    if (group == 0) != (weights == KEPT) or (group and group not in GROUPS):
        c["group"].refuse("0" if weights == KEPT else f"one of {', '.join(map(str, GROUPS))}")
    c["arithmetic"].one_of(ARITHMETICS)
    c["cache"].one_of(CACHES)
    if "decoder_precision" in c.value:  # only where it is not fp32, so other bundles keep their hash
        c["decoder_precision"].one_of(DECODER_PRECISIONS)
    for name in c["kept"].entries(0, 2**18):
        name.text(MOST_NAME)
    c["source"].match("[0-9a-f]{64}", "64 hexadecimal digits")
    c["report"].object()
    return weights, group


def matrices_of(n_layers: int) -> list[str]:
    """Every matrix of the step network that can be quantised, in the order of a call."""
    return [*(f"layers.{i}.{matrix}" for i in range(n_layers) for matrix in MATRICES), "output"]


def _check_quantised(m: Value, n_layers: int, quantised: str, group: int) -> None:
    """The table of weights is what the calibration says: the dtype of quantised matrices, the shape of their scales,
    and which matrices are kept.
    """
    given = m.get("calibration") is not None
    if m.get("weights") is None or not m.value["weights"]:
        if quantised != KEPT:
            m["calibration"]["weights"].refuse(f"{KEPT!r}, as the manifest has no table of weights")
        return
    table, found = m["weights"], set()
    allowed = ", ".join(STORAGE) + (f", or {quantised!r}" if quantised != KEPT else "")
    for name, entry in table.items(2**18):
        dtype, shape, *_ = entry.entries(4, 4)
        if dtype.value not in MOST_CODE:
            continue
        if dtype.value != quantised:
            says = "as the calibration says" if given else "as there is no calibration"
            dtype.refuse(f"a dtype of {allowed}, {says}")
        k, n = shape.integers(1, 2**32)
        if k % group or (dtype.value == "int4" and n % 2):
            shape.refuse(f"rows that are a multiple of the group, {group}, and columns that fill whole bytes")
        scale_dtype, scale_shape, *_ = table[name + SCALE].entries(4, 4)
        scale_dtype.one_of(STORAGE)
        if tuple(scale_shape.integers(1, 2**32)) != (k // group, n):
            scale_shape.refuse(f"{[k // group, n]}, which follows from {name} and the group")
        found.add(name)
    for name in table.value:  # backends take a matrix with scales for a quantised one
        of = name.removesuffix(SCALE)
        if of != name and of not in found:
            raise Mismatch(f"weights has {shown(name, 60)}, and {shown(of, 60)} is not quantised")
    kept = [name for name in matrices_of(n_layers) if name not in found] if quantised != KEPT else []
    if given and sorted(m["calibration"]["kept"].value) != sorted(kept):
        m["calibration"]["kept"].refuse(f"{shown(kept)}, the matrices that are not quantised though others are")


def _check_ids(ids: Value, n_classes: int, rows: int) -> None:
    ids["class_base"].integer(0, rows - n_classes)
    ids["no_class"].integer(0, rows - 1)
    if ids.get("learnable_base") is not None:
        ids["learnable_base"].integer(0, rows)  # n = 1 has no learnable tokens after it


def _check_cache(cache: Value, s: Mapping[str, int], n_tokens: int) -> None:
    cache["dtype"].one_of(STORAGE)
    cache["heads"].integer(s["n_heads"], s["n_heads"])
    cache["head_dim"].integer(s["head_dim_padded"], s["head_dim_padded"])
    names = []
    for side in ("inputs", "outputs"):
        names += [entry.text() for entry in cache[side].entries(2 * s["n_layers"], 2 * s["n_layers"])]
    if len(set(names)) != len(names):
        cache["outputs"].refuse("names that differ from each other and from the inputs")
    numbers = 2 * 2 * s["n_layers"] * s["n_heads"] * s["head_dim_padded"] * n_tokens
    if numbers > MOST_CACHE_NUMBERS:
        raise Mismatch(f"a guided image needs a cache of {numbers} numbers; expected at most {MOST_CACHE_NUMBERS}")


def _check_tokenizer(m: Value, vocab_size: int, files: Mapping[str, int]) -> None:
    m["tokenizer"]
    tokenizer = m.get("tokenizer")
    if tokenizer is None:
        return
    t, h, w = m["grid"].value
    if tokenizer.get("kind") is not None:
        tokenizer["kind"].one_of((VIDEO,))
        check_video(tokenizer, m["graphs"], (t, h, w), vocab_size, files[WEIGHTS])
        if tokenizer.get("weights") is not None:
            shapes = clip_decoder_shapes(tokenizer["config"].value)
            _check_decoder(tokenizer, shapes, m.get("weights"), files[WEIGHTS])
        return
    if t != 1:
        tokenizer.refuse("a video tokenizer or null, because the grid has several frames")
    m["graphs"]["decoder"]
    config = tokenizer["config"]
    widths = config["channel_multipliers"].integers(1, 2**10)
    if not 1 <= len(widths) <= 10:
        config["channel_multipliers"].refuse("1 to 10 levels")
    side = tokenizer["downsampling"].integer(2 ** (len(widths) - 1), 2 ** (len(widths) - 1))
    if tokenizer["image_size"].integers(1, 2**14, 2) != [h * side, w * side]:
        tokenizer["image_size"].refuse(f"[{h * side}, {w * side}]: the grid times the downsampling")
    tokenizer["codebook_size"].integer(vocab_size, vocab_size)
    config["codebook_size"].integer(vocab_size, vocab_size)
    channels, blocks = config["channels"].integer(1, 2**16), config["res_blocks"].integer(1, 2**8)
    config["norm_groups"].integer(1, 2**16)
    z, code = config["z_channels"].integer(1, 2**16), config["codebook_dim"].integer(1, 2**16)
    numbers = sum((blocks + 1) * 9 * (channels * width) ** 2 for width in widths) + 9 * z * channels + code * vocab_size
    if numbers * min(BYTES.values()) > files[WEIGHTS]:
        raise Mismatch(f"tokenizer needs at least {int(numbers / 2)} bytes of weights; {WEIGHTS} has {files[WEIGHTS]}")
    if tokenizer.get("weights") is not None:
        groups, channels = config["norm_groups"].value, config["channels"].value
        for multiplier in config["channel_multipliers"].value:
            if channels * multiplier % groups:
                config["norm_groups"].refuse(f"a divisor of the channels of each level, {shown(channels * multiplier)}")
        _check_decoder(tokenizer, decoder_shapes(config.value), m.get("weights"), files[WEIGHTS])


def _check_decoder(tokenizer: Value, shapes: Mapping[str, tuple[int, ...]], model: Value | None, size: int) -> None:
    """The tokenizer's table of weights: exactly the decoder's tensors, beside each other and the model's.

    A tokenizer without it is an older bundle's: only ONNX Runtime can decode.
    """
    table = tokenizer["weights"]
    places = []
    for name, shape in shapes.items():
        _, found, offset, length = check_place(table[name], size, FLOAT_BYTES)
        if tuple(found.value) != shape:
            found.refuse(f"{shown(list(shape))}, which follows from the tokenizer")
        places.append((offset.value, length.value, name))
    for name, _ in table.items(len(shapes)):
        if name not in shapes:
            raise Mismatch(f"tokenizer.weights has {shown(name)}, which its decoder does not have")
    if model is not None and model.value:
        places += [(at[2], at[3], name) for name, at in model.value.items()]
    check_overlaps(places)


def _check_class_names(names: Value, n_classes: int) -> None:
    total = sum(len(entry.text(MOST_CLASS_NAME)) for entry in names.entries(n_classes, n_classes))
    if total > MOST_CLASS_NAMES:
        names.refuse(f"at most {MOST_CLASS_NAMES} characters (it has {total})")


def _check_selftest(selftest: Value, s: Mapping[str, int], n_tokens: int) -> None:
    """Labels and the tokens of their greedy images; empty in bundles of random weights."""
    labels = selftest["labels"].integers(0, s["n_classes"] - 1)
    selftest["guidance"].number(0, MOST_GUIDANCE)
    for image in selftest["tokens"].entries(len(labels), len(labels)):
        image.integers(0, s["vocab_size"] - 1, n_tokens)
