"""Where everything is installed (``REKD_REQUIRE_ALL=1``, as in CI), a skip that hides a missing part fails."""

import os

import pytest

NEVER_SKIPPED = ("debian", "standin", "tensorrt", "triton")
"""Markers whose needs can be installed anywhere; a GPU cannot."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    required = os.environ.get("REKD_REQUIRE_ALL") == "1" and any(map(item.get_closest_marker, NEVER_SKIPPED))
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"REKD_REQUIRE_ALL=1 forbids this skip: {reason}"
    return report
