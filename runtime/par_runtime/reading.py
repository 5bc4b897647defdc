"""What to do where a file cannot be read and the system is at fault: a copy of the file would not help."""

from __future__ import annotations

import errno

_BY_NAME = {
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENFILE": "the whole system has too many: end what holds them, or raise its limit (fs.file-max)",
    "ENOMEM": "the system is out of memory: free some, or run it where there is more",
    "EIO": "the disk reports an error: check the disk, and its connection",
    "ESTALE": "the network's disk has lost it: try again, or mount that disk again",
    "ETIMEDOUT": "the network's disk does not answer: try again, or mount that disk again",
    "ENOTCONN": "what provides its disk has ended: mount that disk again",
    "EACCES": "change its permissions, or run it as another user",
    "EPERM": "change its permissions, or run it as another user",
}
#: errno -> what to do.
REMEDIES = {getattr(errno, name): remedy for name, remedy in _BY_NAME.items() if hasattr(errno, name)}
_ENDS = tuple(REMEDIES.values())


def unreadable(error: OSError) -> str:
    """That something cannot be read, and why; and what to do, where the system is at fault (:func:`advised`)."""
    why = f"cannot be read ({error.strerror or error})"
    remedy = REMEDIES.get(error.errno or 0)
    return f"{why}; {remedy}" if remedy else why


def advised(message: str, otherwise: str) -> str:
    """``message``, which may end with what :func:`unreadable` says; and ``otherwise``, where that has no advice."""
    return message if message.endswith(_ENDS) else f"{message}; {otherwise}"
