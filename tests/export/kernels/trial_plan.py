"""A plan of an engine that is quickly compiled, for tests of what happens to any plan: it puts matrices in order."""

from __future__ import annotations

from collections.abc import Sequence

from par_export.kernels.contents import Contents
from par_export.kernels.spec import Planned, Refused, Spec
from par_export.kernels.targets import Target
from par_runtime.backends.program import Pointer, Profile, Program, Weight
from par_runtime.bundle import Stored

TYPE = {"fp16": "*fp16", "bf16": "*bf16", "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def panels(stored: Stored, precision: str, **changes: object) -> Spec:
    rows, columns = stored.shape
    constants = {"K": rows, "N": columns, "WIDTH": columns, "ORDER": "plain", "HEAD": 32, "PADDED": 32}
    constants |= {"DROP_ROWS": False, "BN": 32, "BK": 32} | changes
    constants["PART"] = constants["BK"]
    parameters = (("raw", TYPE[stored.dtype]), ("packed", TYPE[precision]))
    return Spec("pack.panels", tuple(constants.items()), parameters, 4, 1)


def trial_plan(contents: Contents, images: Sequence[int], target: Target, refused: Refused = frozenset()) -> Planned:
    """One launch before, one for each layer, none after; a weight of each kind."""
    out = Planned()
    bundle, T = contents.bundle, contents.precision
    wo, output = contents.step["layers.0.wo"], contents.step["output"]
    layer, after = panels(wo, T), panels(output, T, BN=64)
    size = wo.shape[0] * wo.shape[1] * 2
    for i in range(contents.config.n_layers):
        stored = contents.step[f"layers.{i}.wo"]
        pack = out.launch(layer, (1, 1, 1), {"raw": Pointer("raw"), "packed": Pointer("packed")})
        out.weights[f"layers.{i}.wo"] = Weight(size, stored, 0, pack)
        gain = contents.read(contents.step[f"layers.{i}.ffn_norm"]).tobytes()
        out.constants[f"gain.{i}"] = gain
        out.weights[f"gain.{i}"] = Weight(len(gain), None, 0, None)
    out.weights["output"] = Weight(output.length, output, 0, None)
    scratch = {"x": (0, size), "y": (4096 * 64, output.length)}
    profile = Profile(
        before=(out.launch(after, (1, 1, 1), {"raw": Pointer("output"), "packed": Pointer("y")}),),
        layer=(out.launch(layer, (1, 1, 1), {"raw": Pointer("layers.{i}.wo"), "packed": Pointer("x")}),),
        after=(),
        scratch=scratch,
        scratch_bytes=4096 * 64 + output.length,
    )
    phases = tuple(phase.name for phase in bundle.phases)
    out.programs["step"] = Program(
        bundle.group_size, phases, contents.config.n_layers, dict.fromkeys(images, profile), {}, 0
    )
    return out
