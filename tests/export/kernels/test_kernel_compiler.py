"""Kernels compiled ahead of time: what is known about each, and what is said where one cannot be."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import child
from par_export.errors import BuildError
from par_export.kernels.compiler import Compiled, Compiler, _environment
from par_export.kernels.spec import Spec
from par_export.kernels.targets import TARGETS

pytest.importorskip("triton", reason="needs triton: pip install '.[kernels-build]'")
SM80, SM90 = TARGETS["SM80"], TARGETS["SM90"]
PACKAGE = "trial_kernels"  # beside this file


def product(warps: int = 4, stages: int = 4, **sizes: int) -> Spec:
    constants = {"N": 256, "K": 256, "BN": 64, "BK": 64, "BM": 8} | sizes
    parameters = (("w", "*fp16"), ("x", "*fp16"), ("y", "*fp32"), ("rows", "i32"))
    return Spec("trial.product", tuple(constants.items()), parameters, warps, stages)


def faulty(source: str) -> Spec:
    return Spec(source, (("N", 1),), (("x", "*fp32"),), 1, 1)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(2, PACKAGE) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def compiled(compiler: Compiler) -> dict[str, Compiled]:
    """A product for each of two targets."""
    return {target.name: compiler.compile([product()], target)[product().name] for target in (SM80, SM90)}


def test_a_kernel_is_compiled_for_each_target_without_a_gpu(compiled: dict[str, Compiled]) -> None:
    assert list(compiled["SM80"].products) == ["mma.m16n8k16"]
    assert list(compiled["SM90"].products) == ["wgmma.mma.m64n8k16"]
    for name, kernel in compiled.items():
        assert kernel.cubin.startswith(b"\x7fELF")
        assert kernel.function == "product"
        assert kernel.function.encode() in kernel.cubin
        assert kernel.warps == 4
        assert 16 < kernel.registers <= 255
        assert 3 * 64 * 64 * 2 <= kernel.shared <= 40000  # of four stages of weights at least three are in flight
        assert kernel.trailing == 2
        assert (kernel.scratch, kernel.spills, kernel.fault(TARGETS[name])) == (0, 0, None)


def test_weights_are_read_16_bytes_at_a_time(compiled: dict[str, Compiled]) -> None:
    """Without the attributes of alignment they would be 2, in a hundred instructions."""
    for kernel in compiled.values():
        assert kernel.copies["16"] >= 12
        assert "2" not in kernel.loads


@pytest.mark.slow
def test_kernels_are_compiled_by_two_processes_and_counted(compiler: Compiler) -> None:
    steps: list[tuple[int, int]] = []
    specs = [product(N=n) for n in (1024, 512, 768, 1024)]  # none of which was made before
    out = compiler.compile(specs, SM80, lambda *step: steps.append(step))
    assert set(out) == {spec.name for spec in specs}
    assert len(out) == 3
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert compiler.peak_bytes > 2 * 50e6


def test_the_user_s_settings_of_triton_change_nothing_and_its_home_is_not_written(
    compiled: dict[str, Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_INTERPRET", "DISABLE_PTXAS_OPT", "DISABLE_LLVM_OPT", "TRITON_FORCE_DISABLE_FP_FUSION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("A_SETTING_OF_TOMORROW", "1")
    assert "A_SETTING_OF_TOMORROW" not in _environment(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Compiler(1, PACKAGE) as compiler:
        again = compiler.compile([product()], SM80)[product().name]
        assert len(list(tmp_path.iterdir())) == 1
    assert again.cubin == compiled["SM80"].cubin
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (faulty("trial.wrong_name"), r"^kernel trial.wrong_name for SM90: triton .* compile it .*not_there is not def"),
        (
            faulty("ends.kernel"),
            "^kernel ends.kernel for SM90: the process that compiles ended with code 3.* install another triton",
        ),
        (
            faulty("killed.kernel"),
            "^kernel killed.kernel for SM90: .* was ended by SIGKILL; .* memory is short: free some, or",
        ),
        (replace(product(), constants=(("N", 256),)), r"planned with parameters \['w', .* it takes \['w', 'x', 'y'"),
        (replace(product(), parameters=product().parameters[::-1]), r"planned with parameters \['rows', 'y'"),
        (replace(product(), source="trial.nothing"), "AttributeError: .*'nothing'"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_named_in_one_line(spec: Spec, message: str) -> None:
    with Compiler(1, PACKAGE) as compiler, pytest.raises(BuildError, match=message) as error:
        compiler.compile([spec], SM90)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_beside_kernels_that_do_not_compile_the_others_are_made() -> None:
    bad, other = faulty("trial.wrong_name"), replace(product(), constants=(("N", 256),))
    good, failed = [product(), product(BK=32)], dict[str, str]()
    with Compiler(2, PACKAGE) as compiler:
        made = compiler.compile([bad, good[0], other, good[1]], SM80, failed=failed)
        assert list(made) == [each.name for each in good]
        assert set(failed) == {bad.name, other.name}
        assert "not_there is not def" in failed[bad.name]
        assert list(compiler.compile(good, SM80)) == list(made)
        with pytest.raises(BuildError, match="planned with parameters"):
            compiler.compile([other], SM80)


def test_a_folder_that_takes_no_files_is_named_not_the_compiler() -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Compiler(1, PACKAGE) as compiler:
        (worker,) = compiler._workers
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(BuildError, match=r"cannot be compiled in .* too large\); TMPDIR names another folder"):
            compiler.compile([product()], SM80)


@pytest.mark.slow
def test_spills_and_too_much_shared_memory_are_faults(compiler: Compiler) -> None:
    many = product(1, 1, BN=128, BM=64, BK=16)  # 256 sums for each thread of a warp
    large = product(4, 4, BN=256, BK=128)  # 4 stages of 64 KiB
    out = compiler.compile([many, large], SM80)
    assert "bytes of registers in memory" in str(out[many.name].fault(SM80))
    assert "bytes of shared memory, a block has at most 166912" in str(out[large.name].fault(SM80))
    assert out[large.name].fault(SM90) is None
    assert "scratch" in str(replace(out[large.name], scratch=16).fault(SM90))


def test_a_killed_build_leaves_no_files_and_no_processes(tmp_path: Path) -> None:
    code = (
        "import dataclasses, os, signal, sys, test_kernel_compiler as t\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with t.Compiler(2, t.PACKAGE) as c: c.compile([t.product(N=n) for n in (256, 512, 1024)], t.SM80, kill)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with child([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error
    deadline = time.monotonic() + 30  # they end when they have compiled what they were at
    while any(tmp_path.iterdir()):
        assert time.monotonic() < deadline, list(tmp_path.rglob("*"))
        time.sleep(0.05)


def test_ctrl_c_ends_the_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARVIS_TEST_HANGS", str(tmp_path))

    def stop(*_: object) -> None:
        if any(tmp_path.iterdir()):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt), Compiler(1, PACKAGE) as compiler:
            compiler.compile([faulty("hangs.kernel")], SM80)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (worker,) = tmp_path.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker.name), 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"triton/__init__.py": "raise RuntimeError('no libc')"}, r"triton cannot be loaded \(RuntimeError: no libc"),
        (
            {
                "sitecustomize.py": "import sys\nclass No:\n  @staticmethod\n  def find_spec(name, *_):\n"
                "    if name == 'triton': raise ModuleNotFoundError(name)\nsys.meta_path.insert(0, No)"
            },
            "compiled by triton, which is not installed: .*install.*(triton|kernels-build)",
        ),
    ],
)
def test_without_a_usable_triton_one_line_says_what_to_install(
    files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(BuildError, match=message):
        Compiler()
