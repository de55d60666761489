"""The doctor's findings: each has its line, and what is wrong on a machine is said with what to do."""

import tomllib
from pathlib import Path

import pytest

from rwkv_lab import cli, doctor, machine
from rwkv_lab.doctor import Finding, examine, requirements

ROOT = Path(__file__).parent.parent


def found(what: str) -> Finding:
    (one,) = [finding for finding in examine() if finding.what == what]
    return one


def test_one_line_each_and_what_to_do(capsys):
    findings = examine()
    assert {"python", "rwkv_lab", "torch", "threads", "waiting", "backends", "gpu", "memory", "reports", "cache"} <= {
        finding.what for finding in findings
    }
    assert all("\n" not in str(finding) for finding in findings)
    assert all(finding.advice for finding in findings if finding.state == "FAIL")
    assert cli.main(["doctor"]) in (0, 1)
    assert len(capsys.readouterr().out.splitlines()) == len(findings)


def test_packages_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    read = requirements()
    assert read[""] == project["dependencies"]
    assert "papermill>=2.6" in read["workbench"] and "all" not in read


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(
        doctor, "requirements", lambda: {"": ["torch>=2.10"], "text": ["no-such-package>=1", "torch>=99"]}
    )
    assert found("packages").state == "ok"
    one = found("[text]")
    assert one.state == "note" and "no-such-package>=1, torch>=99" in one.found
    assert one.advice == "pip install 'rwkv_lab[text]'"


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cpu", (2, 13, 0)), ("2026.8", (2026, 8)), ("1.0rc1", (1, 0, 1))]
)
def test_versions(version, numbers):
    assert doctor._numbers(version) == numbers


def test_little_memory_and_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "memory_free", lambda: 10**8)
    assert found("memory").state == "note" and "100 MB free" in found("memory").found
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "reports_folder", lambda: tmp_path / "file" / "reports")
    assert found("reports").state == "FAIL" and found("reports").advice
    assert cli.main(["doctor"]) == 1


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("RWKV_LAB_CACHE", str(tmp_path))
    one = found("compiler")
    assert one.state == "note" and one.advice == "Correct or unset it." and ".." not in str(one)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("compiler").advice == "Install g++, or name one in CXX."


def test_a_cache_that_cannot_be_written_to_is_a_note(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "cache", Path("/proc/cache")):
        monkeypatch.setenv("RWKV_LAB_CACHE", str(folder))
        one = found("cache")
        assert (one.state, one.found) == ("note", f"{folder} cannot be written to") and "RWKV_LAB_CACHE" in one.advice


def test_threads_that_spin(monkeypatch):
    monkeypatch.setattr(doctor.threads, "policy_in_force", lambda: "OMP_WAIT_POLICY=ACTIVE")
    assert found("waiting").state == "note" and "PASSIVE" in found("waiting").advice
