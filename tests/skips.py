"""Reads SKIPS.md beside what was skipped: a skip that the table does not have fails the run.

A pytest plugin, loaded by conftest.py; with pytest-xdist it works in the process that hears of all tests.
"""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("SKIPS.md")
_NAME = re.compile(r"`([^`]+)`")


def declared(text: str) -> list[str]:
    """The tests that the table's rows name: `tests/a/test_b.py`, or `tests/a/test_b.py::test_c`, or a pattern of it.

    A name without a file is of the file that stands before it in its row.
    """
    found = []
    for row in re.findall(r"^\|([^|]*)\|", text, re.M):
        file = ""
        for name in _NAME.findall(row):
            if "::" in name or name.endswith(".py"):
                file = name.split("::")[0]
                found.append(name)
            else:
                found.append(f"{file}::{name}")
    return found


def undeclared(skipped: list[str], names: list[str]) -> list[str]:
    """Those of the skipped node ids that no name of the table stands for."""
    return [node for node in skipped if not any(_stands_for(name, node) for name in names)]


def _stands_for(name: str, node: str) -> bool:
    file, _, test = node.partition("::")
    wanted_file, _, wanted = name.partition("::")
    return file == wanted_file and (not wanted or not test or fnmatchcase(test.split("[")[0], wanted))


class Watch:
    """Hears of every skip, of a test or of a whole file, and ends the run with a failure if one is not in the table."""

    def __init__(self):
        self.skipped: dict[str, None] = {}  # in order, each once
        self.missing: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped[report.nodeid] = None

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped[report.nodeid] = None

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        self.missing = undeclared(list(self.skipped), declared(TABLE.read_text()))
        if self.missing and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for node in self.missing:
            terminalreporter.write_line(f"SKIPPED without a line in {TABLE.name}: {node}", red=True)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # a worker of xdist sees only its own tests
        config.pluginmanager.register(Watch(), "skips-watch")
