"""The torture suite in short: it runs, and it finds what is wrong."""

import pytest
from torture import __main__ as torture
from torture import endurance, mutations


def test_damaged_files(tmp_path):
    done, wrong = mutations.run(25, tmp_path)
    assert done.startswith("25 damaged files") and not wrong


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        mutations, "jobs", lambda *_: {"fails": lambda: 1 / 0, "ends the process": lambda: mutations.os._exit(3)}
    )
    wrong = mutations.run(2, tmp_path)[1]
    assert [line.partition(": ")[2] for line in wrong] == ["the process ended with 3"] * 2
    monkeypatch.setattr(mutations, "jobs", lambda *_: {"fails": lambda: 1 / 0})
    assert "ZeroDivisionError" in mutations.run(1, tmp_path / "more")[1][0]


def test_long_use(tmp_path):
    done, wrong = endurance.run_tokens(1000, tmp_path)
    assert done.startswith("1000 tokens, 2 states") and not wrong


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        torture.main(["mutation"])
    assert "there is no part mutation" in capsys.readouterr().err
