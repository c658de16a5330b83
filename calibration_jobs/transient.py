"""Errors of a shared file system or a network that may be gone on the next try; the Hub's library retries by itself."""

import contextlib
import errno
import time
from collections.abc import Generator

ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EREMOTEIO, errno.EAGAIN}
PAUSE_SECONDS = 5.0  # before a task that met one ends, and is tried again


class TransientError(OSError):
    """Says what happened; the task that raises it is worth another try."""


@contextlib.contextmanager
def transient_errors(pause_s: float = PAUSE_SECONDS) -> Generator[None]:
    """Turns errors that may be gone on the next try into TransientError, after a pause."""
    try:
        yield
    except OSError as error:
        if error.errno not in ERRORS:
            raise
        time.sleep(pause_s)
        raise TransientError(error.errno, error.strerror, error.filename) from error
