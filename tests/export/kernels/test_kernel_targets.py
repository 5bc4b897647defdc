"""GPUs that kernels are built for: what is known about each, and what is said about others."""

from __future__ import annotations

import pytest

from par_export.errors import BuildError
from par_export.kernels.targets import TARGETS, runs_on, target_of
from par_runtime.cost.data_sheets import DATA_SHEETS


def test_targets_are_the_documented_ones_with_the_limits_of_their_capability() -> None:
    assert list(TARGETS) == ["SM80", "SM86", "SM89", "SM90", "SM100", "SM120"]
    assert {name: t.shared_block // 1024 for name, t in TARGETS.items()} == {
        "SM80": 163,
        "SM86": 99,
        "SM89": 99,
        "SM90": 227,
        "SM100": 227,
        "SM120": 99,
    }
    assert all(t.shared_processor == t.shared_block + 1024 for t in TARGETS.values())
    assert [name for name, t in TARGETS.items() if t.dependent] == ["SM90", "SM100", "SM120"]
    assert target_of("sm90").processors == 132
    assert target_of("SM80").sheet == DATA_SHEETS["A100-80"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SM75", "before SM80 GPUs lack the copies that the kernels need: --engine tensorrt builds for SM75"),
        ("SM70", "--engine tensorrt builds for SM75"),
        ("SM87", "an engine for SM86 runs there too"),
        ("SM103", "--engine tensorrt may build for it"),
        ("SM121", "--engine tensorrt may build for it"),
        ("SM" + "9" * 10000, "expected SM and a compute capability"),
        ("SM\u0668\u0660", "expected SM and a compute capability"),
        ("SM080", "expected SM and a compute capability"),
    ],
)
def test_another_target_is_refused_with_those_that_there_are(name: str, why: str) -> None:
    with pytest.raises(BuildError, match=rf"^target 'SM.*: engines of kernels are built for SM80, .*{why}$") as error:
        target_of(name)
    assert len(str(error.value)) < 400


def test_a_gpu_takes_the_latest_kernels_that_run_on_it() -> None:
    wanted = {80: "SM80", 86: "SM86", 87: "SM86", 89: "SM89", 90: "SM90", 100: "SM100", 103: None, 121: None, 75: None}
    assert {capability: runs_on(capability) for capability in wanted} == wanted
