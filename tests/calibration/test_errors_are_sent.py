"""Every error of ours can be sent to another process: a pool of processes ends, or waits, where one cannot be read."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pickle
from pathlib import Path

import pytest

import par_calibration
import par_export
import par_model
import par_runtime

PACKAGES = (par_model, par_runtime, par_export, par_calibration)
#: What their constructors take, by the annotation.
EXAMPLES = {
    "str": "what was given; what is expected",
    "int": 3,
    "bool": True,
    "tuple[int, int]": (4, 5),
    "Sequence[str]": ("one", "two"),
    "Report": "a report",
}


def names(base: ast.expr) -> str:
    return base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""


def exceptions() -> list[tuple[str, str]]:
    """(module, name) of every class of an exception in the sources, also of those that derive from another of ours."""
    classes = []
    for package in PACKAGES:
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            module = ".".join((package.__name__, *file.relative_to(folder).with_suffix("").parts))
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    classes.append((module.removesuffix(".__init__"), node.name, {names(base) for base in node.bases}))
    known = {name for name, of in vars(builtins).items() if isinstance(of, type) and issubclass(of, BaseException)}
    while more := {name for _, name, bases in classes if bases & known} - known:
        known |= more
    return [(module, name) for module, name, bases in classes if bases & known]


@pytest.mark.parametrize(("module", "name"), exceptions())
def test_an_error_is_the_same_in_another_process(module: str, name: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    takes = list(inspect.signature(kind.__init__).parameters.values())[1:] if "__init__" in vars(kind) else []
    error = kind(*([EXAMPLES[each.annotation] for each in takes] or [EXAMPLES["str"]]))
    error.more = "what somebody added"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is kind
        assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


def test_the_list_is_not_empty() -> None:
    assert {"OutOfMemory", "EngineError", "KernelError", "OverBudgetError", "CheckpointError"} <= {
        name for _, name in exceptions()
    }
