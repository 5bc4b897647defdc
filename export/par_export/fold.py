"""Half-precision weights cast to fp32 once, into a file beside the bundle's, instead of in every call.

A step graph that computes in fp32 over fp16 or bf16 weights casts them. ONNX Runtime would fold the casts while it
makes the session, holding both forms; unfolded, each call casts all weights again. So the gate writes them in fp32 into
a file of its own, which is gone when it ends: ONNX Runtime maps it and packs one matrix after another out of it, and
holds the fp32 weights once. Where memory or disk are too small for that, nothing is folded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from par_export.graph import ONNX_TYPE, WEIGHTS_FILE, WeightTable
from par_export.weights import TORCH_TYPE, Weights

WIDE_FILE = ".verify-weights.data"
#: What the gate needs beside the weights: caches, logits, activations of the oracle.
MARGIN_BYTES = 3 * 10**9
CGROUP = Path("/sys/fs/cgroup")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def wide_bytes(table: WeightTable) -> int:
    """Size of all weights in fp32."""
    return sum(stored.length * 4 // BYTES.get(stored.dtype, 4) for stored in table.entries.values())


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int:
    """Memory this process may still take without anything being paged out; 0 where the system does not say."""
    try:
        free = int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0
    try:  # a container's own limit; "max" is none
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return free
    return min(free, limit - used)


def fits(table: WeightTable) -> bool:
    """Whether memory allows a session that holds all weights in fp32."""
    return wide_bytes(table) + MARGIN_BYTES <= available_bytes()


def widened(folder: Path, table: WeightTable) -> WeightTable | None:
    """Write the half-precision weights of ``table`` into ``WIDE_FILE`` in fp32; None where there are none, or no room."""
    half = {name: stored for name, stored in table.entries.items() if BYTES.get(stored.dtype) == 2}
    room = shutil.disk_usage(folder).free - sum(2 * stored.length for stored in half.values())
    if not half or room < MARGIN_BYTES or not fits(table):
        return None
    wide = Weights(folder / WIDE_FILE)
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            for name, stored in half.items():
                tensor = torch.empty(stored.shape, dtype=TORCH_TYPE[stored.dtype])
                file.seek(stored.offset)
                if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != stored.length:
                    raise OSError(f"{folder / WEIGHTS_FILE}: ends before {name}")
                wide.add(name, [tensor], "float32")
    finally:
        wide.close()
    return WeightTable(wide.entries)


def without_casts(path: Path, wide: WeightTable) -> Path:
    """The graph at ``path`` with the weights of ``wide`` read in fp32 and their casts left out; written beside it."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    fp32 = ONNX_TYPE["float32"]
    folded = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and node.input[0] in wide.entries and helper.get_node_attr_value(node, "to") == fp32
    }
    kept = [node for node in graph.node if node.output[0] not in folded]
    others = sorted({name for node in kept for name in node.input} & set(wide.entries))
    if others:
        raise ValueError(f"{path}: {others[0]} is used without a cast to fp32; such a graph cannot be folded")
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = folded.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)
    for tensor in graph.initializer:
        if tensor.name in wide.entries:
            at = wide.entries[tensor.name]
            tensor.data_type = TensorProto.FLOAT
            del tensor.external_data[:]
            for key, value in (("location", WIDE_FILE), ("offset", at.offset), ("length", at.length)):
                tensor.external_data.add(key=key, value=str(value))
    out = path.with_name(f".verify-{path.name.removeprefix('.verify-')}")
    out.write_bytes(model.SerializeToString())
    return out
