"""Which errors of files are worth another try."""

import errno
import pickle

import pytest

from calibration_jobs.transient import TransientError, transient_errors


def test_an_error_that_may_be_gone_is_told_from_others():
    with pytest.raises(TransientError, match=r"layer\.safetensors") as raised, transient_errors(pause_s=0):
        raise OSError(errno.ESTALE, "Stale file handle", "layer.safetensors")
    crossed = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(crossed, TransientError) and str(crossed) == str(raised.value)
    for error in (FileNotFoundError("no"), OSError(errno.ENOSPC, "No space left"), ValueError("other")):
        with pytest.raises(type(error)) as raised, transient_errors(pause_s=0):
            raise error
        assert not isinstance(raised.value, TransientError)
