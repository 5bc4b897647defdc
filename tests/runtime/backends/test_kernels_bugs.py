"""Planted bugs of engines of kernels, in lists of launches and in what runs them: the stand-in GPU catches all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from double import bare
from double.bugs import no_wait_before_the_copy_is_read
from double.driver import Driver, ViolationError
from double.fixtures import SETTINGS, Make
from planted import one_by_default

from par_export.kernels.spec import Planned
from par_runtime.backends import cuda
from par_runtime.backends.kernels import modules
from par_runtime.backends.kernels.modules import Prepared
from par_runtime.backends.kernels.plan import KernelProgram
from par_runtime.backends.program import Launch, Pointer
from par_runtime.errors import CudaError, EngineError
from par_runtime.pipeline import Pipeline

Change = Callable[[Planned], None]


def in_launches(planned: Planned, source: str, change: Callable[[Launch, list[str]], Launch]) -> None:
    """Change the launches of ``source`` in the step; ``change`` is given the names of its parameters too."""
    step = planned.programs["step"]

    def changed(launch: Launch) -> Launch:
        spec = planned.specs[launch.kernel]
        return change(launch, [name for name, _ in spec.parameters]) if spec.source == source else launch

    profiles = {
        images: replace(
            profile,
            before=tuple(map(changed, profile.before)),
            layer=tuple(map(changed, profile.layer)),
            after=tuple(map(changed, profile.after)),
        )
        for images, profile in step.profiles.items()
    }
    planned.programs["step"] = replace(step, profiles=profiles)


def with_arguments(launch: Launch, names: list[str], **given: Any) -> Launch:
    arguments = dict(zip(names, launch.arguments, strict=True)) | given
    return replace(launch, arguments=tuple(arguments.values()))


def keys_and_values_swapped(planned: Planned) -> None:
    def change(launch: Launch, names: list[str]) -> Launch:
        k, v = (launch.arguments[names.index(f"past_{kind}")] for kind in "kv")
        return with_arguments(launch, names, past_k=v, past_v=k)

    in_launches(planned, "attention.attend", change)


def weights_of_another_layer(planned: Planned) -> None:
    def change(launch: Launch, names: list[str]) -> Launch:
        weights = launch.arguments[names.index("weights")]
        assert isinstance(weights, Pointer)
        return with_arguments(launch, names, weights=replace(weights, name=weights.name.replace("{i}", "0")))

    in_launches(planned, "step.gates", change)


def rows_too_few(planned: Planned) -> None:
    def change(launch: Launch, names: list[str]) -> Launch:
        rows = launch.arguments[names.index("M")]
        assert isinstance(rows, int)
        return with_arguments(launch, names, M=rows // 2)

    in_launches(planned, "step.qkv", change)


def a_grid_too_large(planned: Planned) -> None:
    in_launches(planned, "step.gates", lambda launch, _: replace(launch, grid=(launch.grid[0], launch.grid[1] + 1, 1)))


def a_grid_too_small(planned: Planned) -> None:
    in_launches(planned, "attention.attend", lambda launch, _: replace(launch, grid=(*launch.grid[:1], 1, 1)))


def launches_in_another_order(planned: Planned) -> None:
    step = planned.programs["step"]
    profiles = {
        images: replace(profile, layer=(profile.layer[1], profile.layer[0], *profile.layer[2:]))
        for images, profile in step.profiles.items()
    }
    planned.programs["step"] = replace(step, profiles=profiles)


def buffers_in_one_place(planned: Planned) -> None:
    step = planned.programs["step"]
    profiles = {
        images: replace(
            profile, scratch=dict(profile.scratch) | {"q": (profile.scratch["h"][0], profile.scratch["q"][1])}
        )
        for images, profile in step.profiles.items()
    }
    planned.programs["step"] = replace(step, profiles=profiles)


def a_kernel_that_does_not_wait(planned: Planned) -> None:
    """Compiled without waiting, and launched early all the same."""
    for name, spec in planned.specs.items():
        if spec.source == "step.gates":
            planned.specs[name] = replace(spec, constants=tuple(dict(spec.constants, DEPENDENT=False).items()))


def a_cubin_of_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packers of two matrices change places: their arguments are of the same kinds."""
    real = bare.register

    def register(driver: Driver, folder: Path) -> None:
        real(driver, folder)
        one, other = [d for d, (kernel, _) in driver.cubins.items() if kernel.source == "pack.panels"][:2]
        driver.cubins[one], driver.cubins[other] = driver.cubins[other], driver.cubins[one]

    monkeypatch.setattr(bare, "register", register)


def counters_that_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Buffer, "zero", lambda self, stream: stream.fill(self.pointer, 1, self.size))


def the_first_launch_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = modules._config
    monkeypatch.setattr(
        modules, "_config", lambda grid, warps, shared, _, stream: real(grid, warps, shared, True, stream)
    )


def shared_memory_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "WITHOUT_ASKING", 2**20)


def an_address_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Prepared.set
    seen: set[tuple[int, str]] = set()

    def set_once(self: Prepared, name: str, address: int) -> None:
        if name != "write" or (id(self), name) not in seen:
            real(self, name, address)
        seen.add((id(self), name))

    monkeypatch.setattr(Prepared, "set", set_once)


def launches_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    real = KernelProgram.context
    monkeypatch.setattr(KernelProgram, "context", lambda self, profile, *rest: real(self, max(profile - 1, 0), *rest))


def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Prepared.enqueue

    def enqueue(self: Prepared, *which: Any) -> None:
        if "raw" not in self._places:
            real(self, *which)

    monkeypatch.setattr(Prepared, "enqueue", enqueue)


def a_block_filled_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Event, "synchronize", lambda self: None)


IN_LISTS = [
    keys_and_values_swapped,
    weights_of_another_layer,
    rows_too_few,
    a_grid_too_large,
    a_grid_too_small,
    launches_in_another_order,
    buffers_in_one_place,
    a_kernel_that_does_not_wait,
]
IN_WHAT_RUNS_THEM = [
    a_cubin_of_another_kernel,
    counters_that_are_not_zero,
    the_first_launch_too_early,
    shared_memory_not_asked_for,
    an_address_that_stays,
    launches_of_another_size,
    nothing_is_packed,
    a_block_filled_before_it_is_copied,
    no_wait_before_the_copy_is_read,
]


@pytest.fixture(scope="module")
def wanted(tiny: Path) -> list[Any]:
    cpu = Pipeline.load(tiny, device="cpu", selftest=False)
    return [cpu.generate([0, 3], seed=seed, decode=False, **settings()).tokens for seed in (1, 2)]


def settings() -> dict[str, Any]:
    return {name: values[:2] for name, values in SETTINGS.items()}


def differs(load_kernels: Make, wanted: list[Any], change: Change = lambda planned: None) -> bool:
    try:
        gpu = load_kernels(images=(1, 2), change=change)
        got = [gpu.generate([0, 3], seed=seed, decode=False, **settings()).tokens for seed in (1, 2)]
    except (ViolationError, EngineError, CudaError) as error:
        print(f"caught: {error}")
        return True
    captured_whole = gpu.backend.capturing == "image"  # type: ignore[attr-defined]
    return not captured_whole or any((a != b).any() for a, b in zip(got, wanted, strict=True))


def test_without_a_bug_nothing_differs(load_kernels: Make, wanted: list[Any]) -> None:
    assert not differs(load_kernels, wanted)


@pytest.mark.parametrize("bug", one_by_default(IN_LISTS), ids=lambda bug: bug.__name__)
def test_a_bug_in_a_list_of_launches_is_caught(load_kernels: Make, wanted: list[Any], bug: Change) -> None:
    assert differs(load_kernels, wanted, bug), f"{bug.__name__} went unnoticed"


@pytest.mark.parametrize("bug", one_by_default(IN_WHAT_RUNS_THEM), ids=lambda bug: bug.__name__)
def test_a_bug_in_what_runs_them_is_caught(
    load_kernels: Make, wanted: list[Any], monkeypatch: pytest.MonkeyPatch, bug: Any
) -> None:
    bug(monkeypatch)
    assert differs(load_kernels, wanted), f"{bug.__name__} went unnoticed"
