"""Pauses between restarts, and when there are no more."""

from __future__ import annotations

import pytest

from rekd_deploy.server.restart import NEVER, RestartPolicy
from rekd_train.errors import ConfigError


def test_pauses_double_up_to_the_longest_and_end_at_the_limit():
    policy = RestartPolicy(limit=6, first_pause=0.5, longest_pause=3.0)
    assert [policy.pause(deaths) for deaths in range(1, 9)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0, None, None]


def test_never():
    assert NEVER.pause(1) is None


def test_negative_limit():
    with pytest.raises(ConfigError, match="is -1; it must be at least 0"):
        RestartPolicy(limit=-1)
