"""Errors of the operating system: with the file that they are about, and as one line that says what to do.

The words are a copy of ``par_runtime.system``'s, which the oracle does not import; a test holds the two together.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What says that the system cannot read a file, not that what is in it is damaged.
OF_THE_SYSTEM = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, getattr(errno, "ESTALE", errno.EIO)),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)

#: errno -> what is wrong with the file or folder, and what to do.
EXPLAINED = {
    errno.EACCES: "no permission for {}; choose another place or change its permissions",
    errno.EPERM: "no permission for {}; choose another place or change its permissions",
    errno.EROFS: "no permission for {}: it is on a read-only file system; choose another place",
    errno.ENOSPC: "no space left on the disk of {}; free some or choose another place; nothing was half-written",
    errno.EFBIG: "{} is larger than this system or its limit (ulimit -f) allows; choose another place",
    errno.EIO: "{}: the disk reports an error (EIO); check the disk, or choose another place",
    errno.EISDIR: "{} is a folder where a file is expected; choose another place",
    errno.ENOTDIR: "{} is a file where a folder is expected; choose another place",
    errno.EEXIST: "{} is a file where a folder is expected; choose another place",
    errno.ENAMETOOLONG: "{}: the name is too long for this file system; give a shorter one",
    errno.ELOOP: "{}: its links lead in a circle; choose another place",
    errno.ENOENT: "{}: no such file or folder; check the name, or choose another place",
    errno.EMFILE: "too many open files, at {}; raise the limit (ulimit -n)",
    errno.ENFILE: "the whole system has too many open files, at {}; end what holds them (or raise fs.file-max)",
    errno.ENOMEM: "the system is out of memory, at {}; free some",
    errno.ESTALE: "{}: the network's disk has lost it (ESTALE); try again, or mount that disk again",
    errno.EDQUOT: "the disk quota is used up, at {}; free some space or choose another place",
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  #: what only writing can meet


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put ``path`` into an OSError that names no file: reading and writing an open file do not say which one it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.strerror = error.strerror or str(error)  # Pillow's have a text and no number
            error.filename = str(path)
        raise


def explain(error: OSError) -> str:
    """What went wrong with which file and what to do, in one line."""
    if error.filename is None and error.errno in (errno.EMFILE, errno.ENFILE):
        return "too many open files; raise the limit (ulimit -n)"
    if error.filename is None and error.errno not in NO_ROOM:
        return error.strerror or str(error)
    where = "the output" if error.filename is None else os.fsdecode(error.filename)
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
        link = _broken_link(where)
        if link is not None:
            return f"{link[0]}: its links lead {link[1]}; choose another place"
    if len(where) > 300:
        where = f"{where[:140]}...{where[-140:]}"
    if error.errno in EXPLAINED:
        return EXPLAINED[error.errno].format(where)
    return f"{where}: {error.strerror or ' '.join(map(str, error.args))}"


def _broken_link(path: str) -> tuple[str, str] | None:
    """The first link on ``path`` that leads to nothing, and where it leads, in words; None where there is none."""
    for each in (*reversed(Path(path).parents), Path(path)):
        if os.path.islink(each) and not os.path.exists(each):
            try:
                os.stat(each)
            except OSError as error:
                return str(each), "in a circle" if error.errno == errno.ELOOP else "nowhere"
    return None
