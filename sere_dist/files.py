"""Paths that a user names, and files and folders that are there whole, or not at all."""

import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator


def _no_address(path: Any) -> Any:
    if isinstance(path, str | Path) and re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{path} is an address, this is a path: mount the bucket on all nodes, or copy from and to it")
    return path


# A path in a file system. "s3://bucket/folder" would be taken for a folder named "s3:" below the current one.
FilePath = Annotated[Path, BeforeValidator(_no_address)]


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
