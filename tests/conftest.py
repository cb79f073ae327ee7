"""Before `moshi` is imported: it compiles small functions, which costs more than the tests do."""

import logging
import os

import pytest

os.environ["NO_TORCH_COMPILE"] = "1"


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The configuration file of a small run: see `training_tools.write_config`."""
    from training_tools import write_config

    return write_config(tmp_path_factory.mktemp("training"))


@pytest.fixture(autouse=True)
def _own_log_handlers():
    """A program under test writes its log to what is standard output then."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before
    logging.captureWarnings(False)
