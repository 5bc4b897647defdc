"""What all programs of an engine of kernels have in common on the device: functions, weights, counters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from par_runtime.backends import cuda
from par_runtime.backends.engines import Engine
from par_runtime.backends.kernels.modules import Module
from par_runtime.backends.kernels.upload import OnBytes, Weights, read_own
from par_runtime.backends.program import Kernels
from par_runtime.loaded import LoadedFiles


class Shared(cuda.Owned):
    """``modules`` by the name of their kernel, the ``addresses`` of weights, and of the ``states`` of programs."""

    def __init__(
        self,
        engine: Engine,
        kernels: Kernels,
        files: LoadedFiles,
        device: cuda.Device,
        stream: cuda.Stream,
        on_load: OnBytes | None,
    ) -> None:
        self._held = ExitStack()
        try:
            self.modules = self._modules(engine, kernels)
            weights = Weights(engine, kernels, files, device, stream, self.modules, on_load)
            self._held.enter_context(weights)
            self.addresses = weights.addresses
            self.states: dict[str, int] = {}
            for name, program in kernels.programs.items():
                state = self._held.enter_context(
                    device.allocate(max(program.state_bytes, 1), f"counters of the {name}")
                )
                state.zero(stream)  # once: every launch leaves them as it found them
                self.states[name] = state.pointer
            stream.synchronize()
        except BaseException:
            self._held.close()
            raise

    def _modules(self, engine: Engine, kernels: Kernels) -> Mapping[str, Module]:
        out = {}
        step = kernels.programs["step"]
        # The step's kernels hardly use the L1 cache, and follow each other too fast to wait for another division of the
        # processors. The decoder's convolutions use it.
        fast = {launch.kernel for images in step.profiles for launch, _ in step.launches(images)}
        for name, kernel in kernels.kernels.items():
            image = read_own(engine, kernel.file, kernel.bytes, kernel.sha256)
            out[name] = self._held.enter_context(Module(kernel, image, most_shared=name in fast))
        return out

    def free(self) -> None:
        self._held.close()
