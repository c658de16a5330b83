"""The log of a replica, whose engine configures logging anew when it starts."""

import logging
import logging.config
from logging.handlers import MemoryHandler, RotatingFileHandler

import pytest

from serve_apps.server import log_file_kept


@pytest.fixture
def log(tmp_path):
    """A logger as Ray Serve gives a replica one, and its file."""
    logger, file = logging.Logger("replica"), tmp_path / "replica.log"
    logger.addHandler(MemoryHandler(1, target=RotatingFileHandler(file)))
    yield logger, file
    logger.handlers[0].close()


def test_what_is_logged_after_the_engines_start_is_in_the_file(log):
    logger, file = log
    with log_file_kept(logger):
        logger.warning("before")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # as vLLM does
        assert logger.handlers[0].target is None  # or there is nothing to keep any more
    logger.warning("after")
    assert file.read_text() == "before\nafter\n"
    assert logger.handlers[0].target.baseFilename == str(file)
