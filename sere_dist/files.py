"""A file or a folder is there whole, or not at all."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


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
