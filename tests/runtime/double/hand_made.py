"""An engine of kernels that computes nothing of use: for tests of how engines are loaded and launched."""

from __future__ import annotations

import numpy as np

from par_export.kernels.spec import Planned, Spec
from par_runtime.backends.program import Pointer, Profile, Program, Weight
from par_runtime.bundle import Bundle

BN, BK = 16, 16


def panels(k: int, n: int, kind: str, dependent: bool = False) -> Spec:
    """Packs a matrix [k, n]."""
    constants = {"K": k, "N": n, "WIDTH": n, "ORDER": "plain", "HEAD": 8, "PADDED": 8, "DROP_ROWS": False}
    constants |= {"BN": BN, "BK": BK, "PART": BK}
    return Spec("pack.panels", tuple(constants.items()), (("raw", "*fp16"), ("packed", kind)), 4, 1, dependent)


def hand_made(bundle: Bundle, images: tuple[int, ...] = (1, 2), dependent: bool = False) -> Planned:
    """Packs every matrix of the first layer when it is loaded, and one of them again in each layer of a call."""
    plan = Planned()
    matrices = {name: at for name, at in bundle.weights.items() if len(at.shape) == 2 and ".0." in name}
    for name, at in matrices.items():
        k, n = at.shape
        spec = panels(k, n, "*fp32")
        blocks = (-(-n // BN), -(-k // BK), 1)
        pack = plan.launch(spec, blocks, {"raw": Pointer("raw"), "packed": Pointer("packed")})
        plan.weights[name] = Weight(blocks[0] * blocks[1] * BN * BK * 4, at, 0, pack)
    largest = max(bundle.weights.values(), key=lambda at: at.length)
    plan.weights["table"] = Weight(largest.length, largest, 0, None)
    plan.constants["ones"] = np.ones(64, np.float16).tobytes()
    plan.weights["ones"] = Weight(128, None, 0, None)
    spec = panels(8, 8, "*fp32", dependent)
    launch = plan.launch(spec, (1, 1, 1), {"raw": Pointer("ones"), "packed": Pointer("out.a")})
    other = plan.launch(spec, (1, 1, 1), {"raw": Pointer("ones"), "packed": Pointer("past_k.{i}")})
    counters = plan.launch(spec, (1, 1, 1), {"raw": Pointer("ones"), "packed": Pointer("counters", 0, 1024)})
    profiles = {b: Profile((launch,), (other, counters), (launch,), {"out.a": (256, 4096)}, 4096 + 256) for b in images}
    phases = tuple(phase.name for phase in bundle.phases)
    plan.programs["step"] = Program(bundle.group_size, phases, 2, profiles, {"counters": (0, 2048)}, 2048)
    return plan
