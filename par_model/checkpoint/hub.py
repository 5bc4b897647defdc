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
        match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)/([^@\\]+)(?:@([\w./-]+))?", name)
        parts = "/".join(part for part in match.groups() if part is not None).split("/") if match else []
        odd = [part for part in parts if part in ("", ".", "..") or not part.isprintable() or len(part) > 255]
        if match is None or odd:
            raise CheckpointError(f"{name[:200]}: {EXPECTED}")
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
        return _local_path(name)
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
    except (HFValidationError, ValueError) as error:  # the second: names of files that no system takes
        raise CheckpointError(f"{text}: {EXPECTED}") from error
    except RuntimeError as error:  # of pathlib: a user whom nobody has named, as in a container, has no home folder
        raise CheckpointError(
            f"{text}: there is no place to download it to ({error}); set HF_HOME to a folder, or {by_hand}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{text}: the hub cannot be reached ({type(error).__name__}); {by_hand}") from error
    commit = _commit(file)
    if commit is not None and commit != wanted.revision:
        say(
            f"{text}: is at commit {commit} today; {PREFIX}{wanted.repository}/{wanted.file}@{commit} names this very "
            "file"
        )
    return file


def _local_path(name: str | Path) -> Path:
    """The path ``name``. Raises CheckpointError for addresses, which look like paths that are not there."""
    text = str(name)
    if not text:
        raise CheckpointError("the name of a checkpoint is empty; give a file, a folder or an hf:// name")
    if isinstance(name, Path) or not re.match(r"(?i)[a-z0-9]+:/|(www\.)?(huggingface\.co|hf\.co)/", text):
        return Path(name)
    on_hub = re.fullmatch(
        r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/([\w.-]+)/([^?#]+).*",
        text,
    )
    if on_hub is not None:
        repository, revision, file = on_hub.groups()
        at = "" if revision == "main" else f"@{revision}"
        raise CheckpointError(f"{text[:200]}: is an address; give {PREFIX}{repository}/{file}{at} in its place")
    raise CheckpointError(f"{text[:200]}: is an address, which is not read; {EXPECTED}, or a file that is here")


def _commit(file: Path) -> str | None:
    """The commit of a file in the hub's cache (``.../snapshots/COMMIT/path/in/repository``); None for another path."""
    parts = file.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None
