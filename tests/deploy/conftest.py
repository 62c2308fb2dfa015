"""The real server, started once for all tests that only ask it."""

from __future__ import annotations

import pytest

from rekd_deploy.errors import ServerError
from rekd_deploy.server import TritonServer
from rekd_deploy.triton_wheel import find_wheel
from rekd_train.errors import MissingExtraError


@pytest.fixture(scope="session")
def wheel():
    """The server of the wheel; without it the test is skipped."""
    try:
        return find_wheel()
    except (MissingExtraError, ServerError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(wheel, repository, tmp_path_factory):
    """One server for all tests; they must not stop it."""
    with TritonServer(repository, 0, 0, 0, log_file=tmp_path_factory.mktemp("triton") / "log") as server:
        yield server
