"""Paths and artifacts that a user names, and files and folders that are there whole, or not at all."""

import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def _no_address(path: Any) -> Any:
    if isinstance(path, str | Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{path} is an address, this is a path: mount the bucket on all nodes, or copy from and to it")
    return path


# A path in a file system. "s3://bucket/folder" would be taken for a folder named "s3:" below the current one.
FilePath = Annotated[Path, BeforeValidator(_no_address)]

HUB = "hf://"  # how the name of an artifact on the Hub begins
REPOSITORY = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*"


def is_repository(name: str) -> bool:
    """Says whether this is written as a repository of the Hugging Face Hub is: ORG/NAME."""
    return re.fullmatch(REPOSITORY, name, re.ASCII) is not None


@dataclass(frozen=True)
class HubName:
    """The name of an artifact on the Hugging Face Hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION`.

    Attributes:
        repository: ORG/NAME.
        revision: a branch, tag or commit; None for what the branch `main` holds now.
    """

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str | Path) -> "HubName | None":
        """Returns None for a path.

        Raises:
            ValueError: the name begins as one of the Hub does, and is none.
        """
        if not (isinstance(name, str) and name.startswith(HUB)):
            return None
        repository, _at, revision = name.removeprefix(HUB).partition("@")
        if not is_repository(repository) or name.endswith("@"):
            raise ValueError(f"{name} is no artifact on the Hub: write hf://ORG/NAME, or hf://ORG/NAME@REVISION")
        return cls(repository, revision or None)

    def __str__(self) -> str:
        return HUB + self.repository + (f"@{self.revision}" if self.revision else "")


def _artifact_name(name: Any) -> Any:
    if isinstance(name, str) and HubName.parse(name):
        return name
    return str(Path(_no_address(name))) if isinstance(name, str | Path) else name


# A folder's path, or the name of an artifact on the Hub, which a path would not keep: Path("hf://x") is "hf:/x".
ArtifactName = Annotated[str, BeforeValidator(_artifact_name)]


@contextmanager
def written_whole(path: str | Path) -> Generator[Path]:
    """Yields a path to write a file or a folder at, and renames that to `path` when the block ends.

    It lies in a hidden folder beside `path`. If the block raises, what was written is removed, and what was at `path`
    is unchanged. A file at `path` is replaced, an empty folder by a folder; a folder that holds something is not.

    Raises:
        OSError: the folder of `path` can't be written, which is noticed before the block runs, or `path` can't be
            replaced.
    """
    path = Path(path).resolve()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
        written = Path(aside) / path.name
        yield written
        os.replace(written, path)
