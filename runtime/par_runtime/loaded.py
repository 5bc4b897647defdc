"""The files of a bundle that are read after it was loaded, as they were when it was loaded.

ONNX Runtime opens decoder and encoder at their first use, and everything once more in a forked process. By then, the
bundle may have been renamed or removed, a symbolic link may lead to its next version, or the working directory may be
another one. So the graphs are read at once (they are small), and the weights file is kept open: an open file stays what
it is, whatever happens to its name. Only its content can still be changed, by writing into it; that is an error.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from par_runtime.bundle import WEIGHTS, Bundle, Stored, state
from par_runtime.checked import open_regular, shown_path
from par_runtime.dtypes import STORAGE
from par_runtime.errors import BundleError
from par_runtime.held import HeldFile
from par_runtime.manifest_video import FIRST, NEXT
from par_runtime.quantised import SCALE, scale_fault
from par_runtime.reading import REMEDIES, advised, unreadable
from par_runtime.system import available_bytes

READ_LATER = ("step", "step_opset23", "decoder", FIRST, NEXT, "encoder")  #: graphs that ONNX Runtime opens
BLOCK_BYTES = 2**20


class LoadedFiles:
    """Graphs and weights of an opened bundle. Raises BundleError where the weights cannot be read."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._folder = bundle.path.resolve()
        self._graphs: dict[str, bytes] = {}
        versions: dict[str, tuple[int, int]] = {}  # of what was opened: another file may have its name by now
        file = bundle.path / WEIGHTS
        try:
            for name in READ_LATER:
                if name in bundle.graphs:
                    with suppress(FileNotFoundError), open_regular(self._folder / bundle.graphs[name].file) as opened:
                        versions[bundle.graphs[name].file] = state(os.fstat(opened.fileno()))
                        self._graphs[name] = opened.read()
            self._weights = HeldFile(self._folder / WEIGHTS)
        except OSError as error:
            raise _unreadable(error.filename or file, error) from error
        self._closed = self._changed = False
        self._known = state(self._status())
        self._check_versions(versions | {WEIGHTS: self._known})

    def _check_versions(self, opened: Mapping[str, tuple[int, int]]) -> None:
        """Raise BundleError where a file that was ``opened`` had been replaced since it was checked: manifest and
        weights of two versions."""
        for name, found in opened.items():
            if self.bundle.checked.get(name, found) != found:
                self.close()
                raise BundleError(
                    f"{self.bundle.path / name}: was replaced after its manifest was read; load the bundle again"
                )

    def graph(self, name: str) -> bytes | None:
        """The ONNX file of a graph; None where there was none."""
        return self._graphs.get(name)

    def path(self, name: str) -> Path | None:
        """The path of a graph, absolute; None where graph or weights at that path are no longer those that were loaded.

        Raises BundleError where the weights were changed, or the system cannot read the graph.
        """
        self.check()
        path = self._folder / self.bundle.graphs[name].file
        try:
            at_path, held = os.stat(self._folder / WEIGHTS), self._status()
            same = (at_path.st_dev, at_path.st_ino) == (held.st_dev, held.st_ino)
            if not same:
                return None
            with open_regular(path) as opened:
                return path if opened.read() == self._graphs.get(name) else None
        except OSError as error:
            if error.errno in REMEDIES:  # the system's fault: it may still lie there
                raise _unreadable(error.filename or path, error) from error
            return None

    def weights(self, needed: int = 1) -> mmap.mmap:
        """The weights file, mapped. Raises BundleError where it was changed, has less than the ``needed`` bytes, or
        cannot be read; MemoryError where no addresses are left for it.
        """
        self.check()
        if self._known[0] < needed:  # reading beyond its end would kill the process
            raise BundleError(
                f"{self.bundle.path / WEIGHTS}: truncated: {self._known[0]} bytes, its tensors end at {needed}; copy "
                "the bundle again or export it again"
            )
        try:
            return mmap.mmap(self._weights.descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise _unreadable(self.bundle.path / WEIGHTS, error) from error
            # A limit of the process (ulimit -v), or of the system.
            what = f"{shown_path(self.bundle.path / WEIGHTS)}: {self._known[0] / 1e9:.2f} GB"
            raise MemoryError(f"{what} cannot be mapped into memory; see ulimit -v") from error

    def read(self, into: memoryview, offset: int) -> None:
        """Fill ``into`` with the bytes of the weights file from ``offset`` on. Raises BundleError.

        Several threads may read at a time. It does not look whether the file was changed: :meth:`check` does.
        """
        done = 0
        self._status()
        try:
            while done < len(into):
                got = os.preadv(self._weights.descriptor, [into[done:]], offset + done)
                if not got:
                    raise BundleError(
                        f"{self.bundle.path / WEIGHTS}: ends before byte {offset + len(into)}; copy the bundle again "
                        "or export it again"
                    )
                done += got
        except OSError as error:
            raise _unreadable(self.bundle.path / WEIGHTS, error) from error

    def check(self) -> None:
        """Raise BundleError where something wrote into the weights file. It takes a microsecond, so every call checks.

        ONNX Runtime maps a part of the weights, so what is written there would change later images.
        """
        now = state(self._status())
        if now == self._known and not self._changed:
            return
        entry = self.bundle.files[WEIGHTS]
        if self._changed or now[0] != entry["bytes"] or self._hash(now[0]) != entry["sha256"]:
            self._changed = True
            raise BundleError(
                f"{self.bundle.path / WEIGHTS}: was overwritten after it was loaded; load the bundle again. Put a new "
                "version beside the old one and rename it: then what was loaded stays as it is"
            )
        self._known = now  # only its time was changed

    def close(self) -> None:
        """Close the weights file; a second call does nothing."""
        self._closed = True
        self._weights.close()

    def _status(self) -> os.stat_result:
        """What the system says of the weights file now. Raises BundleError where it is closed."""
        found = self._weights.status()
        if found is not None:
            return found
        if self._closed:
            raise BundleError(f"{self.bundle.path}: was closed; load it again")
        raise BundleError(
            f"{self.bundle.path}: the program closed the descriptor of {WEIGHTS} (os.closerange, becoming a daemon); "
            "load the bundle after that"
        )

    def _hash(self, size: int) -> str:
        digest = hashlib.sha256()
        try:
            for offset in range(0, size, BLOCK_BYTES):
                digest.update(os.pread(self._weights.descriptor, BLOCK_BYTES, offset))
        except OSError as error:
            raise _unreadable(self.bundle.path / WEIGHTS, error) from error
        return digest.hexdigest()


def _unreadable(
    file: str | Path, error: OSError, otherwise: str = "copy the bundle again or export it again"
) -> BundleError:
    """The error of a ``file`` of a bundle that the system does not read."""
    return BundleError(advised(f"{file}: {unreadable(error)}", otherwise))


def check_memory(bundle: Bundle, weights_bytes: int) -> None:
    """Raise BundleError where the weights take more memory than is free.

    Linux grants such memory, and kills the process when it is written. A file of weights may claim any size: a sparse
    one takes no disk.
    """
    free = available_bytes()
    if free is not None and weights_bytes > free:
        raise BundleError(
            f"{bundle.path}: its weights take {weights_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB of memory are free; "
            "run it where there is more"
        )


def check_scales(bundle: Bundle, table: Mapping[str, Stored] | None = None) -> None:
    """Raise BundleError where a scale of a quantised matrix is not a positive, finite number.

    ``table``: where they lie, if it is not the manifest's. They are a hundredth of the weights, so each load reads
    them: what a NaN makes of an image is not seen where the self-test is left out.
    """
    places = {name: at for name, at in (table or bundle.weights).items() if name.endswith(SCALE)}
    if not places:
        return
    file, again = bundle.path / WEIGHTS, "copy the bundle again, or calibrate again"
    try:
        with open_regular(file) as opened:
            for name, at in sorted(places.items(), key=lambda place: place[1].offset):
                opened.seek(at.offset)
                content = opened.read(at.length)
                if len(content) < at.length:
                    raise BundleError(f"{file}: ends before byte {at.offset + at.length}; {again}")
                why = scale_fault(np.frombuffer(content, STORAGE[at.dtype]), at.dtype)
                if why is not None:
                    raise BundleError(f"{file}: {name} {why}; {again}")
    except OSError as error:
        raise _unreadable(file, error, again) from error
