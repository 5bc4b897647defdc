"""Where engines are put and found: in their bundle, in a folder that is named, or in the user's cache."""

from __future__ import annotations

import ast
import errno
import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from par_export import engines, graphs, kernels
from par_export.cli import build as build_cli
from par_export.engines.cache import EngineCache
from par_export.engines.publish import MODEL
from par_runtime.backends.engines import cached_engine_folder, has_engines, list_engines
from par_runtime.bundle import Bundle
from par_runtime.cli import dispatch
from par_runtime.system import cache_folder

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install '.[tensorrt-rtx]'")
BUILD = ["--target", "SM80", "--images", "1"]


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the system refuse to write below ``folder``, as on a disk that is mounted so (root may write anywhere)."""
    mkdir, open_ = os.mkdir, os.open

    def check(path: Any) -> None:
        if Path(os.fsdecode(path)).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def no_mkdir(path: Any, *more: Any, **named: Any) -> None:
        check(path)
        mkdir(path, *more, **named)

    def no_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            check(path)
        return open_(path, flags, *more, **named)

    monkeypatch.setattr(os, "mkdir", no_mkdir)
    monkeypatch.setattr(os, "open", no_open)


def test_a_read_only_bundle_gets_its_engine_in_the_cache_folder(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only(monkeypatch, tiny_copy)
    assert build_cli.main([str(tiny_copy), *BUILD]) == 0
    bundle = Bundle.open(tiny_copy)
    folder = cached_engine_folder(bundle)
    assert folder is not None
    said = capsys.readouterr().out
    assert f"{tiny_copy} cannot be written (Read-only file system); the engine goes to {folder}" in said
    (engine,), bad = list_engines(bundle, "full")
    assert engine.path.parent == folder
    assert bad == []
    assert has_engines(bundle)
    assert engine.rebuild.startswith(f"parvis build {tiny_copy} --target SM80 ")
    assert not (tiny_copy / "engines").exists()
    assert dispatch.main(["inspect", str(tiny_copy)]) == 0
    assert f"engine    {engine.path}: SM80" in capsys.readouterr().out

    # It is that bundle's alone: a changed bundle has another hash. And a folder that is named is looked at too.
    monkeypatch.undo()
    monkeypatch.setenv("PARVIS_CACHE", str(tmp_path / "cache"))
    assert build_cli.main([str(tiny_copy), *BUILD, "--out", str(tmp_path / "named"), "--quiet"]) == 0
    assert len(list_engines(bundle)[0]) == 1
    monkeypatch.setenv("PARVIS_ENGINE_DIR", str(tmp_path / "named"))
    assert [e.path.parent.parent for e in list_engines(bundle)[0]] == [
        tmp_path / "named",
        tmp_path / "cache" / "bundles",
    ]
    assert build_cli.main([str(tiny_copy), *BUILD, "--quiet"]) == 0  # into the folder of the variable
    assert not (tiny_copy / "engines").exists()


def test_without_a_place_the_error_names_one_to_give(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only(monkeypatch, tmp_path)
    assert build_cli.main([str(tiny_copy), *BUILD]) == 2
    error = capsys.readouterr().err
    assert error.startswith("parvis: error: no permission to write ")
    assert error.endswith("; give another place with --out DIR or PARVIS_ENGINE_DIR\n")
    assert error.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_left_out(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert build_cli.main([str(tiny_copy), *BUILD, "--cache-dir", str(tmp_path / "file" / "cache")]) == 0
    said = capsys.readouterr().out
    assert f"the engine cache is not used: {tmp_path / 'file'} is a file where a folder is expected" in said
    assert len(list_engines(Bundle.open(tiny_copy))[0]) == 1
    assert EngineCache(tmp_path / "good").why_unusable() == ""


def test_the_cache_folder_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PARVIS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PARVIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "parvis"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed to be: left out
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/parvis")

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None


def test_the_hash_of_sources_has_every_module_of_the_model_that_engines_are_built_with() -> None:
    packages = [Path(str(package.__file__)).parent for package in (engines, graphs, kernels)]
    files = [file for package in packages for file in package.rglob("*.py")]
    found: set[str] = set()
    while files:
        tree = ast.parse(files.pop().read_text())
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "par_model"]
        names |= {f"par_model.{alias.name}" for node in froms for alias in node.names}
        new = {name for name in names if name.startswith("par_model.")} - found
        found |= new
        files += [Path(str(importlib.import_module(name).__file__)) for name in new]
    assert found == {module.__name__ for module in MODEL}
