"""Compiles all C files at once; pyproject.toml says everything else."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class AtOnce(build_ext):
    """Extensions beside each other, which pip's editable builds do not do where pyproject.toml asks for it, and the
    files of an extension too, which setuptools compiles one after the other.
    """

    def build_extensions(self) -> None:
        """As setuptools does."""
        self.parallel = self.parallel or True  # as many as there are CPUs
        compile_files = self.compiler.compile

        def at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(len(sources)) as pool:
                objects = pool.map(lambda source: compile_files([source], **options), sources)
                return [name for each in objects for name in each]

        def with_less(sources: list[str], **options: Any) -> list[str]:
            try:
                return at_once(sources, **options)
            except CompileError:  # the assembler is older than the compiler (before binutils 2.36: no AMX, no AVX-VNNI)
                return at_once(
                    sources, **options | {"macros": [*(options.get("macros") or ()), ("FEWER_INSTRUCTIONS", None)]}
                )

        self.compiler.compile = with_less
        super().build_extensions()


setup(cmdclass={"build_ext": AtOnce})
