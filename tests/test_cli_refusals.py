"""Every hostile input through the command line: it says what Python says, and nothing else happens."""

from itertools import groupby

import pytest
import torch
from hostile import CASES
from in_process import execute
from models import random_model, snapshot

from rwkv_lab import cli, merge
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.workbench import batch

# Words that stand otherwise in a notebook's parameters: an empty dtype, and a path before it is shortened.
OTHERWISE = {"dtype='int4': it should be 'bf16'": "dtype='int4': it should be '', 'bf16'", "/sub/../": "/"}
# The parameters of each notebook that name a checkpoint, and what it needs beside it.
FILES = {
    "benchmark": {"model": {}},
    "chat": {"model": {}, "state": {"model": "good.pth"}, "adapter": {"model": "good.pth"}},
    "convert": {"source": {"to": "pth"}},
    "export": {"checkpoint_path": {"base_model_name": "good.pth"}},
    "inspect": {"checkpoint": {}},
    "modes": {"model": {}},
    "peft": {"adapter": {"base": "good.pth"}},
    "train": {"base": {}},
}
UNREADABLE = [next(cases) for number, cases in groupby(CASES, lambda c: c.number) if number in {*range(1, 10), 24}]


@pytest.fixture
def command(monkeypatch, tmp_path_factory, capsys):
    """(words of the command line) -> (exit code, what it says on stderr)."""
    report = tmp_path_factory.mktemp("report")
    monkeypatch.setattr(batch, "execute", execute)
    monkeypatch.setenv("RWKV_LAB_COMMAND", "")  # which the command sets

    def run(*words: str) -> tuple[int, str]:
        code = cli.main([*words, f"report={report}"])
        return code, capsys.readouterr().err.strip()

    return run


def words_of(given: dict) -> list[str]:
    shown = {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return [f"{name}={value}" for name, value in shown.items()]


def refused(work) -> str:
    with pytest.raises(RwkvLabError) as e:
        work()
    return f"{type(e.value).__name__}: {e.value}".strip()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_merge_says_what_python_says(case, command, tmp_path):
    given = case.make(tmp_path)
    before = snapshot(tmp_path)
    expected = refused(lambda: merge(**given))
    for theirs, ours in OTHERWISE.items():
        expected = expected.replace(theirs, ours)
    assert command("merge", *words_of(given)) == (1, expected)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda c: c.id)
def test_every_command_says_what_is_wrong_with_a_file(case, command, tmp_path):
    given = case.make(tmp_path)
    own = {str(tmp_path / "state.pth"), str(tmp_path / "base.pth")}
    wrong = next(given[name] for name in ("tuned", "base") if given[name] not in own)
    torch.save(random_model(), tmp_path / "good.pth")
    before = snapshot(tmp_path)
    expected = refused(lambda: open_checkpoint(wrong))
    for notebook, files in FILES.items():
        for name, more in files.items():
            beside = {n: tmp_path / v if v == "good.pth" else v for n, v in more.items()}
            code, said = command(notebook, *words_of({name: wrong} | beside))
            whole = said == expected or notebook == "export" and said.endswith(expected.partition(": ")[2])
            assert code == 1 and whole, f"{notebook} {name}: {said}"  # export says of a folder what it looked for
    assert snapshot(tmp_path) == before
