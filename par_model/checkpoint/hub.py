"""Checkpoints by their name on the Hugging Face hub: ``hf://owner/repository/path/in/it@revision``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from par_model.checkpoint.errors import CheckpointError

PREFIX = "hf://"
EXPECTED = (
    "expected hf://OWNER/REPOSITORY/FILE or hf://OWNER/REPOSITORY/FILE@REVISION, for instance "
    "hf://Epiphqny/PAR/PAR-XL-4x.pt"
)


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at a revision (a commit, tag or branch; None is the newest)."""

    repository: str
    file: str
    revision: str | None

    @staticmethod
    def parse(name: str) -> HubFile:
        """The file that ``name`` names. Raises CheckpointError."""
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@([\w./-]+))?", name)
        if match is None or ".." in match.group(2).split("/"):
            raise CheckpointError(f"{name}: {EXPECTED}")
        return HubFile(*match.groups())

    @property
    def address(self) -> str:
        """The address that a browser downloads it from."""
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision or 'main'}/{self.file}"


def local(name: str | Path, say: Callable[[str], None] = print) -> Path:
    """The local file of ``name``: a path is returned as it is, a hub name is downloaded into the hub's own cache.

    A branch may change. Where ``name`` gives no commit, ``say`` gets a line with the commit that was downloaded, so
    that the next export can name the same file. Raises CheckpointError; where the hub cannot be reached, the message
    names the address to download by hand.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    wanted = HubFile.parse(text)
    by_hand = (
        f"on a machine that reaches it download {wanted.address}, copy the file here and give its path "
        f"({Path(wanted.file).name}) instead of the hf:// name"
    )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub import logging as hub_logging
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{text}: needs the package huggingface_hub: pip install huggingface_hub, or {by_hand}"
        ) from error
    hub_logging.set_verbosity_error()  # it logs each retry; only the outcome is reported, below
    try:
        file = Path(hf_hub_download(wanted.repository, wanted.file, revision=wanted.revision))
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{text}: {wanted.repository} has no revision {wanted.revision!r}; leave it out for the newest"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{text}: no repository {wanted.repository!r}, or it is private: huggingface-cli login"
        ) from error
    except EntryNotFoundError as error:  # so is LocalEntryNotFoundError: the hub cannot be reached
        if "LocalEntryNotFound" in type(error).__name__:
            raise CheckpointError(f"{text}: the hub cannot be reached; {by_hand}") from error
        raise CheckpointError(f"{text}: {wanted.repository} has no file {wanted.file!r}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{text}: {EXPECTED}") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{text}: the hub cannot be reached ({type(error).__name__}); {by_hand}") from error
    commit = _commit(file)
    if commit is not None and commit != wanted.revision:
        say(
            f"{text}: is at commit {commit} today; {PREFIX}{wanted.repository}/{wanted.file}@{commit} names this very "
            "file"
        )
    return file


def _commit(file: Path) -> str | None:
    """The commit of a file in the hub's cache (``.../snapshots/COMMIT/path/in/repository``); None for another path."""
    parts = file.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None
