"""pytest plugin of a round on a GPU machine: every failure is in a file at once, should the run be cut short.

FAILURES=FILE python -m pytest -p gpu_failures ...    with this folder on the path
"""

from __future__ import annotations

import os


def pytest_runtest_logreport(report) -> None:
    # With pytest-xdist a worker hands its reports on to the process that started it, which comes here too.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["FAILURES"], "a") as file:
            file.write(f"{report.nodeid}, {report.when}, {report.duration:.1f} s\n{report.longreprtext}\n\n")
