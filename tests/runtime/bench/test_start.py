"""The suite ``start``: each sample is a new process, its parts add up, and a failure is that of any other suite."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from bench.subjects import MACHINE, Scripted, subject_info

from par_runtime.bench import bounds, machine
from par_runtime.bench.bounds import with_bounds
from par_runtime.bench.limits import Limits, Round
from par_runtime.bench.measure import Repetitions, Setting
from par_runtime.bench.report import page, text
from par_runtime.bench.report.advice import advice
from par_runtime.bench.report.compare import compare
from par_runtime.bench.rows import Row, read
from par_runtime.bench.subjects.base import STARTING, Sample
from par_runtime.bench.subjects.process import SubjectProcess, open_bundle
from par_runtime.bench.subjects.starts import StartSubject
from par_runtime.bench.suites.start import start, start_rows
from par_runtime.bundle import Bundle, seal
from par_runtime.cli.dispatch import main
from par_runtime.errors import BundleError

ALL = [*STARTING, "start", "image"]


def quiet(_: str) -> None:
    pass


@dataclass
class Starts:
    """Starts processes of the bundle at ``path``, and keeps them; before the i-th it calls ``before(i)``."""

    path: Path
    label: str = "parvis"
    before: Callable[[int], object] = lambda _: None
    made: list[SubjectProcess] = field(default_factory=list)

    def __call__(self) -> SubjectProcess:
        self.before(len(self.made))
        self.made.append(open_bundle(self.path, self.label, threads=1))
        return self.made[-1]


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_each_sample_is_a_process_of_its_own_and_its_parts_add_up(tiny: Path) -> None:
    starts = Starts(tiny)
    subject = StartSubject(starts)
    rows = start([subject], Setting("start", images=2, repetitions=3), quiet)
    by = {row.phase: row for row in rows}
    assert list(by) == ALL
    assert len({process.pid for process in starts.made}) == 5  # two that are not counted, three samples
    assert not any(alive(process.pid) for process in starts.made)
    assert {len(row.samples_ms) for row in rows} == {3}
    assert all(ms > 0 for row in rows for ms in row.samples_ms)
    for i, whole in enumerate(by["start"].samples_ms):
        assert sum(by[part].samples_ms[i] for part in STARTING) == pytest.approx(whole)
    assert by["load"].samples_ms == tuple(process.load_ms for process in starts.made[2:])
    assert by["selftest"].samples_ms == tuple(process.selftest_ms for process in starts.made[2:])
    calls = sum(phase.repeat for phase in Bundle.open(tiny).phases)
    assert {phase: row.calls for phase, row in by.items() if row.calls} == {"first_image": calls, "image": calls}
    assert by["image"].images_per_s == pytest.approx(2e3 / by["image"].median_ms)
    assert {(row.images, row.clock, row.excluded) for row in rows} == {(2, "perf_counter", ("writing files",))}
    assert all("few repetitions" in row.marks for row in rows)  # loading too, which is timed each time
    assert by["image"].peak_bytes is None or by["image"].peak_bytes > 10**7


def test_what_passes_before_loading_is_pythons_and_the_second_image_is_in_no_part(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole is on the clock of the process that starts the other one; a second is planted before and after it."""
    real, made = SubjectProcess.image, list[int]()

    def image(self: SubjectProcess, *arguments: Any) -> Sample:
        made.append(self.pid)
        time.sleep(1.0 if len(made) == 2 else 0.0)
        return real(self, *arguments)

    monkeypatch.setattr(SubjectProcess, "image", image)
    subject = StartSubject(Starts(tiny, before=lambda i: time.sleep(1.0 if i == 1 else 0.0)))
    began = time.perf_counter()
    sample = subject.run(1, True)
    took = 1e3 * (time.perf_counter() - began)
    assert made[0] == made[1]  # the second image is made where the first one was
    assert sample.calls_ms["python"][0] > 1000
    assert sum(sum(times) for times in sample.calls_ms.values()) + 1000 + sample.image_ms < took


def test_a_start_is_not_the_work_of_others(tiny: Path) -> None:
    """Its process is no child when the watch begins; what it took must count as ours all the same."""
    subject = StartSubject(Starts(tiny))
    subject.warm_up(1, True)
    before = machine.counters()
    subject.run(1, True)
    after = machine.counters()
    if before is None or after is None:
        pytest.skip("this system counts no CPU time")
    assert after.ours_s - before.ours_s > 0.1  # Python and numpy alone take more


def test_one_bundle_that_fails_does_not_end_the_others(tiny: Path, tmp_path: Path) -> None:
    """A file that goes after the first sample is missed by the second: nothing lives on."""
    path = shutil.copytree(tiny, tmp_path / "tiny")

    def breaks(i: int) -> None:
        if i == 3:
            (path / "manifest.json").unlink()

    setting = Setting("start", repetitions=2)
    rows = start([StartSubject(Starts(path, "b", before=breaks)), StartSubject(Starts(tiny))], setting, quiet)
    assert {(row.label, len(row.samples_ms)) for row in rows} == {("b", 1), ("parvis", 2)}
    assert {row.label for row in rows if "incomplete" in row.marks} == {"b"}
    assert isinstance(setting.failed["b"], BundleError)
    assert "manifest.json" in str(setting.failed["b"])


def test_the_last_subject_that_fails_ends_the_suite(tiny: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny, tmp_path / "tiny")
    subject = StartSubject(Starts(path, before=lambda i: (path / "manifest.json").unlink() if i else None))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        start([subject], Setting("start", repetitions=2), quiet)


def test_of_several_bundles_one_is_in_memory_at_a_time(tiny: Path) -> None:
    made: list[Starts] = []

    def alone(_: int) -> None:
        assert not any(alive(process.pid) for starts in made for process in starts.made)

    made += [Starts(tiny, "a", before=alone), Starts(tiny, "b", before=alone)]
    rows = start([StartSubject(each) for each in made], Setting("start", repetitions=2), quiet)
    assert {(row.label, len(row.samples_ms)) for row in rows} == {("a", 2), ("b", 2)}
    assert [len(each.made) for each in made] == [4, 4]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_bundle_that_is_replaced_meanwhile_is_not_measured_on(at: int, tiny: Path, tmp_path: Path) -> None:
    """Rows name one bundle; a sample of another one in them would be false, however well it was made."""
    path, other = (shutil.copytree(tiny, tmp_path / name) for name in ("tiny", "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["defaults"]["guidance"] += 1.0
    (other / "manifest.json").write_text(json.dumps(seal(manifest)))

    def replaces(i: int) -> None:
        if i == at:
            path.rename(tmp_path / "old")
            other.rename(path)

    starts = Starts(path, before=replaces)
    with pytest.raises(BundleError) as error:
        start([StartSubject(starts)], Setting("start", repetitions=4), quiet)
    was, now = (Bundle.open(folder, "none").hash for folder in (tmp_path / "old", path))
    assert was != now
    assert str(error.value) == (
        f"{path}: was replaced by another bundle while its starts were measured: at first {was[:12]}, then {now[:12]}; "
        "leave it alone, and measure again"
    )
    assert len(starts.made) == at + 1
    assert not any(alive(process.pid) for process in starts.made)


def test_a_subject_that_runs_otherwise_is_not_measured_on(tiny: Path) -> None:
    """As where a driver goes, and a bundle starts on the CPU instead of its engine."""
    subject = StartSubject(Starts(tiny))
    now, subject._first = subject._first.backend, replace(subject._first, backend="kernels")
    with pytest.raises(BundleError, match=rf"runs otherwise \(backend\) while .* at first kernels, then {now}; "):
        subject.run(1, True)
    assert not alive(subject._process.pid)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "measure_cpu", lambda *_: Round({2**30: {"by hand": 20.0}}, {"by hand": 0.1}))
    monkeypatch.setattr(bounds, "MORE_ROUNDS", 0)


@pytest.mark.usefixtures("known_limits")
def test_the_command_with_every_file_and_a_comparison(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "html")}
    arguments = ["bench", str(tiny), "--suite", "start", "--device", "cpu", "--repetitions", "1", "--threads", "1"]
    more = [
        "--unguided",
        "--images",
        "2",
        "--cache",
        "bf16",
        *(word for name, path in files.items() for word in (f"--{name}", str(path))),
    ]
    assert main([*arguments, *more, "--against", "ort"]) == 0
    rows = read(files["json"])
    assert [(row.label, row.phase) for row in rows] == [(label, phase) for label in ("parvis", "ort") for phase in ALL]
    assert {(row.suite, row.images, row.guided, row.threads) for row in rows} == {("start", 2, False, 1)}
    assert {row.backend for row in rows if row.label == "ort"} == {"onnxruntime-cpu"}
    assert {row.phase for row in rows if row.bound_ms is not None} == {"image"}
    out = capsys.readouterr().out
    assert re.search(r"^start: parvis (is|takes) .* ort \(", out, re.MULTILINE)
    assert re.search(r"^parvis: of the .* until the first batch of 2 images, ", out, re.MULTILINE)
    assert "not included: writing files\n" in out
    assert "predicted" not in out
    assert "Where the time until the first image goes" in files["html"].read_text()
    assert main([*arguments, "--images", "2", "--unguided", "--cache", "bf16", "--compare", str(files["json"])]) == 0
    out = capsys.readouterr().out
    assert [line.split()[3] for line in out.splitlines() if line.startswith("only old")] == ["ort"] * len(ALL)
    assert "only new" not in out


@pytest.mark.usefixtures("known_limits")
def test_ctrl_c_keeps_the_rows_and_ends_the_process(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pids = SubjectProcess.image, list[int]()

    def image(self: SubjectProcess, *arguments: Any) -> Sample:
        pids.append(self.pid)
        if len(pids) == 6:  # one that is not counted, two of each sample: the second of the third
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(SubjectProcess, "image", image)
    file = tmp_path / "rows.jsonl"
    arguments = ["bench", str(tiny), "--suite", "start", "--device", "cpu", "--threads", "1", "--repetitions", "4"]
    assert main([*arguments, "--json", str(file)]) == 130
    assert capsys.readouterr().out.startswith("not complete: the run was stopped\n")
    rows = read(file)
    assert [row.phase for row in rows] == ALL
    assert all("incomplete: 2 of 4 repetitions were made before it ended" in row.flags for row in rows)
    assert json.loads(file.read_text().splitlines()[-1])["kind"] == "stopped"
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("against", "named"), [(["eager"], "eager"), (["ort", "n1"], "n1"), (["n1", "compiled"], "n1 compiled")]
)
def test_baselines_that_start_otherwise_are_refused(
    against: list[str], named: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny), "--suite", "start", "--against", *against]) == 2
    assert capsys.readouterr().err == (
        f"parvis: error: --against {named}: --suite start takes ort alone, the same bundle on ONNX Runtime; PyTorch "
        "loads no bundle, and the random weights of n1 have no self-test\n"
    )


def test_a_bundle_of_random_weights_is_measured_without_a_selftest(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from par_export.random_bundle import write_like  # noqa: TID251, who makes such bundles

    path = Path(write_like(tiny, group_size=4, out=tmp_path))
    arguments = ["bench", str(path), "--suite", "start", "--device", "cpu", "--threads", "1", "--repetitions", "1"]
    assert main([*arguments, "--no-limits", "--json", "-"]) == 0
    phases = [json.loads(line)["phase"] for line in capsys.readouterr().out.splitlines()]
    assert phases == [phase for phase in ALL if phase != "selftest"]


# -- what people see --------------------------------------------------------------------------------------------------


def scripted(label: str = "parvis", selftest: bool = True, slower: float = 1.0, **changes: Any) -> list[Row]:
    """Rows of five starts: 200 ms of Python, 100 of loading, 400 of self-test, 300 of the first image, 150 of the
    second; each repetition a little slower than the one before."""
    parts = {"python": 200.0, "load": 100.0, "selftest": 400.0, "first_image": 300.0}
    if not selftest:
        del parts["selftest"]
    samples = [
        Sample({part: [slower * (1 + i / 100) * ms] for part, ms in parts.items()}, slower * (1 + i / 100) * 150, 10**8)
        for i in range(5)
    ]
    subject = Scripted(subject_info(label, **changes))
    return start_rows(subject, Repetitions(samples, [()] * 5), Setting("start"), MACHINE)


def test_the_advice_says_what_a_start_is_made_of() -> None:
    found = advice(scripted())
    assert found is not None
    assert (found.kind, found.text) == (
        "start",
        "parvis: of the 1020 ms until the first image, 20 % are Python and its imports, 10 % loading the bundle, 40 % "
        "its self-test, 30 % the image; the first image takes 2.00 times as long as the second (306 ms against "
        "153 ms).",
    )
    found = advice([replace(row, images=4) for row in scripted(selftest=False)])
    assert found is not None
    assert (
        "33 % are Python and its imports, 17 % loading the bundle, 50 % the image; the first batch of 4" in found.text
    )


def test_the_second_image_alone_has_a_bound() -> None:
    rows = with_bounds(scripted(), {"parvis": subject_info()}, {2: Limits(((2**30, 1000.0),), 100.0, "by hand")})
    assert {row.phase for row in rows if row.bound_ms is not None} == {"image"}
    shown = text.table(rows)
    assert re.search(r"^parvis +start +1 +1020 ms", shown, re.MULTILINE)
    assert "limits    1000 GB/s" in shown


def test_starts_are_compared_and_only_with_starts_like_them() -> None:
    rows = [*scripted(backend="native-cpu"), *scripted("ort", slower=2.0)]
    assert text.ratios(rows) == ["start: parvis is 2.00 times as fast as ort (1020 ms against 2040 ms)"]
    assert text.ratios([*scripted("a"), *scripted("b", n=16, hash="b")]) == [
        "start: a is as fast as b (1020 ms against 1020 ms; the samples do not tell them apart)"
    ]
    assert text.ratios([*scripted("a"), *scripted("b", selftest=False, n=16, hash="b")]) == []


def test_every_part_is_paired_with_that_of_another_run_and_decoding_tells_apart() -> None:
    old = scripted()
    assert [pair.verdict for pair in compare(old, scripted()).pairs] == ["same"] * len(ALL)
    assert [pair.ratio for pair in compare(old, scripted(slower=1.5)).pairs] == pytest.approx([1.5] * len(ALL))
    found = compare(old, scripted(decoder_computes="bf16"))
    assert [pair.new.phase for pair in found.pairs] == ["python", "load", "selftest"]


def test_the_page_takes_the_start_apart_and_no_second_image() -> None:
    rows = [*scripted("a"), *scripted("b", selftest=False)]
    out = page.page(rows, [], [], None)
    assert "<h2>Where the time until the first image goes</h2>" in out
    assert "Where the time of an image goes" not in out
    assert "<title>a, load: 102 ms, spread 2 ms</title>" in out
    assert "<title>b, first_image: 306 ms, 147 calls, spread 6 ms</title>" in out
    assert out.count("<rect") == 7
    legend = re.findall(r"</i>(\w+)</span>", out)
    assert legend == list(STARTING)
