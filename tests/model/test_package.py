"""What ``par_model`` exports, and that its configurations need no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "code",
    [
        "import par_model",
        "from par_model import PARConfig, VQConfig; PARConfig(dim=16, n_layers=1, n_heads=2)",
        "from par_model.manifest import config_from_manifest, read_manifest",
        "import par_model; dir(par_model)",
    ],
)
def test_configurations_need_no_torch(code: str) -> None:
    run(f"import sys\n{code}\nassert 'torch' not in sys.modules")


@pytest.mark.slow
def test_names_are_the_same_whatever_was_imported_before() -> None:
    """Each in a process of its own, in which PyTorch is imported already: that takes longest."""
    befores = [
        "",
        "import par_model.generation",
        "import par_model.checkpoint, par_model.training.transformer, par_model.baseline",
        "from par_model import *",
        "import par_model; par_model.generate; par_model.generation",
    ]
    after = (
        "from par_model import PAR, PARConfig, VQConfig, VQModel, generate\n"
        "from par_model import config, generation, transformer, vq\n"
        "assert generate is generation.generate and callable(generate)\n"
        "assert (PAR, VQModel) == (transformer.PAR, vq.VQModel)\n"
        "assert (PARConfig, VQConfig) == (config.PARConfig, config.VQConfig)\n"
    )
    run(
        "import os, sys, torch\n"
        "assert 'par_model' not in sys.modules\n"
        f"for before in {befores}:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        f"        exec(before + chr(10) + {after!r}, {{}})\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, before\n"
    )


def test_no_module_has_the_name_of_an_export() -> None:
    import pkgutil

    import par_model
    import par_model.checkpoint

    for package in (par_model, par_model.checkpoint):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"hub"}
        assert not modules & set(package.__all__)
        assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        par_model.nothing  # noqa: B018
