"""The recipe's average of two checkpoints of one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from recipe_scripts import full_disk, scripts

from conftest import golden_config
from par_model.checkpoint import open_checkpoint, par_config
from par_model.config import PARConfig
from par_model.training.device import autocast
from par_model.training.transformer import loss_of, sequences_of
from par_model.transformer import PAR


@pytest.fixture(scope="module")
def average() -> Iterator[ModuleType]:
    """``average.py``."""
    with scripts("average") as (module,):
        yield module


@pytest.fixture
def config(golden: dict[str, dict[str, Any]]) -> PARConfig:
    return golden_config(golden["par_n4_grid8"])


def saved(
    path: Path, sizes: PARConfig, seed: int, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, torch.Tensor]:
    """Random weights, as ``parvis train`` saves them at ``path``; ``more`` replaces entries, None leaves one out."""
    torch.manual_seed(seed)
    state = {key: torch.randn_like(tensor).to(dtype) for key, tensor in PAR(sizes).state_dict().items()}
    names = [f"class {i}" for i in range(sizes.n_classes)]
    content = {"model": state, "config": asdict(sizes) | {"kind": "par"}, "class_names": names} | more
    torch.save({key: entry for key, entry in content.items() if entry is not None}, path)
    return state


@pytest.mark.parametrize(("share", "options"), [(0.5, []), (0.75, ["--share", "0.75"]), (0.0, ["--share", "0"])])
def test_each_number_lies_between_the_two(
    average: ModuleType, config: PARConfig, tmp_path: Path, share: float, options: list[str]
) -> None:
    first, second = saved(tmp_path / "a.pt", config, 0, torch.float16), saved(tmp_path / "b.pt", config, 1)
    out = tmp_path / "out.pt"
    assert average.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--out", str(out), *options]) == 0
    made = open_checkpoint(out)
    assert par_config(made) == config
    assert made.class_names == [f"class {i}" for i in range(config.n_classes)]
    assert set(made.tensors) == set(first)
    for key, tensor in made.tensors.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (1 - share) * first[key].float() + share * second[key])


def test_it_says_how_likely_it_finds_held_out_images(
    average: ModuleType, config: PARConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a.pt", config, 0)
    state = saved(tmp_path / "b.pt", config, 1)
    _, height, width = config.grid
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.vocab_size, (5, height, width)).astype(np.uint16)
    labels = (np.arange(5) % config.n_classes).astype(np.uint8)
    names = np.array([f"class {i}" for i in range(config.n_classes)])
    np.savez(tmp_path / "val.npz", codes=codes, labels=labels, class_names=names)
    command = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--share", "1", "--out", str(tmp_path / "out.pt")]
    assert average.main([*command, "--val", str(tmp_path / "val.npz")]) == 0
    model = PAR(config)
    model.load_state_dict(state)
    tokens = sequences_of(codes, config, config.vocab_size).long()
    with autocast(torch.device("cpu")):  # bf16 where the CPU has instructions for it, as the reports of a training
        nats = float(loss_of(model.eval(), tokens, torch.from_numpy(labels).long()).detach())
    assert f": {nats:.3f} nats per token of {tmp_path / 'val.npz'}" in capsys.readouterr().out
    (tmp_path / "out.pt").unlink()
    np.savez(tmp_path / "val.npz", codes=codes[:, 1:], labels=labels, class_names=names)
    assert average.main([*command, "--val", str(tmp_path / "val.npz")]) == 2
    assert f"--val {tmp_path / 'val.npz'}: has grid (1, {height - 1}, {width})" in capsys.readouterr().err
    np.savez(tmp_path / "val.npz", codes=codes, labels=labels, class_names=names[::-1])
    assert average.main([*command, "--val", str(tmp_path / "val.npz")]) == 2
    assert f"class 0 is 'class {config.n_classes - 1}', not 'class 0' as in the model; give" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_what_it_cannot_use_is_one_line_and_writes_nothing(
    average: ModuleType, config: PARConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, other = (tmp_path / name for name in ("a.pt", "b.pt", "other.pt"))
    saved(a, config, 0)
    saved(b, config, 1)
    saved(other, replace(config, group_size=16), 1)
    (tmp_path / "text.pt").write_text("no checkpoint")

    def refused(text: str, *arguments: object) -> None:
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert average.main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("average.py: error: ")
        assert text in printed.err
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    out = ("--out", tmp_path / "out.pt")
    refused(f"{other}: is of another model than {a}; give two checkpoints of one, of the same n", a, other, *out)
    refused("--share 1.5: expected 0 to 1", a, b, *out, "--share", 1.5)
    refused("--share nan: expected", a, b, *out, "--share", "nan")
    refused(f"--out {b}: is {b}, which it is made of", a, b, "--out", b)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, config.vocab_size, (5, *config.grid[1:])).astype(np.uint16)
    val, link = tmp_path / "val.npz", tmp_path / "link.npz"
    classes = np.array([f"class {i}" for i in range(config.n_classes)])
    np.savez(val, codes=codes, labels=np.arange(5, dtype=np.uint8) % config.n_classes, class_names=classes)
    link.symlink_to(val)
    for place in (val, link):
        why = f"--out {place}: would write {place}, which is --val {val}; give another place"
        refused(why, a, b, "--out", place, "--val", val)
    names = [f"class {i}" for i in range(config.n_classes)]
    saved(other, config, 1, class_names=names[::-1])
    refused(f"{other}: class 0 is '{names[-1]}', not 'class 0' as in {a}; give two", a, other, *out)
    for path in (a, other):
        saved(path, config, 1, class_names=["one"])
    refused(f"{a}: has 1 class names for {config.n_classes} classes; give whole", a, other, *out)
    state = saved(a, config, 0)
    for value in (float("nan"), float("inf")):
        (broken := {key: tensor.clone() for key, tensor in state.items()})["output.weight"][1, 2] = value
        saved(other, config, 1, model=broken)
        refused(f"{other}: output.weight holds NaN or infinity", a, other, *out)
    saved(other, config, 1, config=None)
    refused(f"{other}: has no 'config'; expected a checkpoint of parvis train or from_bundle.py", a, other, *out)
    refused(f"{tmp_path} is a folder; give a file name", a, b, "--out", tmp_path)
    refused("text.pt is a file where a folder is expected; choose", a, b, "--out", tmp_path / "text.pt" / "o.pt")
    refused("none.pt", a, tmp_path / "none.pt", *out)
    refused("text.pt", tmp_path / "text.pt", b, *out)


def test_names_of_one_of_them_are_kept(average: ModuleType, config: PARConfig, tmp_path: Path) -> None:
    saved(tmp_path / "a.pt", config, 0)
    saved(tmp_path / "b.pt", config, 1, class_names=None)
    assert average.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--out", str(tmp_path / "out.pt")]) == 0
    assert open_checkpoint(tmp_path / "out.pt").class_names == [f"class {i}" for i in range(config.n_classes)]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    average: ModuleType, config: PARConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a.pt", config, 0)
    saved(tmp_path / "b.pt", config, 1)
    (tmp_path / "out.pt").write_text("before")
    with full_disk(1000):
        assert average.main([str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--out", str(tmp_path / "out.pt")]) == 2
    assert capsys.readouterr().err.startswith(
        f"average.py: error: {tmp_path / 'out.pt'} is larger than this system or "
    )
    assert (tmp_path / "out.pt").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "out.pt"]
