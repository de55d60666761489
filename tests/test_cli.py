"""The command line: its words, its help, what it refuses, and how soon it answers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile import CASES

from rwkv_lab import cli
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.cli import notebooks
from rwkv_lab.cli.words import described, parameters_from
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.workbench.parameters import read_parameters
from rwkv_lab.workbench.registry import notebook_names, parameters_of

ROOT = Path(__file__).parent.parent
MERGE = notebooks.notebook("merge")


def test_every_notebook_has_its_command(capsys):
    assert set(notebooks.names()) >= set(notebook_names())
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in notebook_names():
        assert f"\n{name} " in f"\n{listed}" and notebooks.notebook(name).title in listed
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert described(notebooks.notebook(name)) in capsys.readouterr().out


@pytest.mark.parametrize("name", notebook_names())
def test_help_is_that_of_the_specs(name):
    fields, read = parameters_of(name).model_fields, notebooks.notebook(name).parameters
    assert list(read) == list(fields)
    for one, field in zip(read.values(), fields.values(), strict=True):
        assert (one.help, one.default) == (field.description, field.default)
    shown = " ".join(described(notebooks.notebook(name)).split())
    assert all(f" {field} " in shown for field in fields)  # long names do not run into their help
    assert all(" ".join(field.description.split()) in shown for field in fields.values())


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["alpha=0.5"], {"alpha": 0.5}),
        (["alpha=1e-3"], {"alpha": 1e-3}),
        (["alpha=None"], {"alpha": None}),
        (["alpha=[0.5,1]"], {"alpha": "[0.5,1]"}),
        (["base=12"], {"base": "12"}),
        (["base=a=b.pth"], {"base": "a=b.pth"}),
        (["out="], {"out": ""}),
        (["dry_run=True", "overwrite=False"], {"dry_run": True, "overwrite": False}),
        (["dry_run=true"], {"dry_run": "true"}),
        (["window=64"], {"window": 64}),
        (["include=blocks.0.*,emb"], {"include": "blocks.0.*,emb"}),
        (["tokenizer=None"], {"tokenizer": "None"}),
    ],
)
def test_words_become_values(words, values):
    assert parameters_from(words, MERGE) == values


def test_lists_and_mappings_reach_the_spec():
    words = [
        "weights=0.5,0.5",
        'parameters={"density": 0.3}',
        "include=emb,head",
        "method=ties",
        "tuned=/a,/b",
        "base=/c",
    ]
    read = read_parameters(parameters_of("merge"), parameters_from(words, MERGE), names_are_all=True)
    assert (read.weights, read.parameters, read.include, read.tuned) == (
        [0.5, 0.5],
        {"density": 0.3},
        ["emb", "head"],
        ["/a", "/b"],
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["alhpa=0.5"], "merge has no parameter 'alhpa'; did you mean alpha?"),
        (["--alpha=0.5"], "parameters have no dashes. Write alpha=0.5"),
        (["--dry-run"], "'--dry-run' sets no parameter. Write dry_run=…"),
        (["alpha=1", "alpha=2"], "alpha is given twice"),
        (["no.pth"], "'no.pth' sets no parameter. Write name=value, such as base=…"),
        (["=1"], "merge has no parameter ''"),
    ],
)
def test_what_is_no_parameter_is_refused(words, said, capsys):
    assert cli.main(["merge", *words]) == 1
    message = capsys.readouterr().err
    assert message.startswith("ParameterError: ") and said in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"dry_run": "true"}, "dry_run='true': it should be a valid boolean\nWrite True and False, spelled like this."),
        ({"parameters": "{'a"}, "It is no JSON. Give a mapping as JSON: 'parameters={"),
        ({"window": 2.0}, "Write it without a fraction or an exponent: window=2"),
        ({"alpha": float("nan")}, "alpha=nan: it should be a finite number"),
        ({"alpha": 1.5, "method": "state", "base": "/b", "tuned": "/t"}, "alpha=1.5"),
        ({"base": ""}, "base=''"),
    ],
)
def test_advice_is_in_words_of_the_command(words, said, monkeypatch):
    monkeypatch.setenv("RWKV_LAB_COMMAND", "rwkv-lab")
    with pytest.raises(RwkvLabError) as refused:
        read_parameters(parameters_of("merge"), words, names_are_all=True).check_files()
    assert said in str(refused.value) and "papermill" not in str(refused.value)


def test_notebooks_that_are_not_there(tmp_path, capsys):
    broken, plain = tmp_path / "broken.ipynb", tmp_path / "plain.ipynb"
    broken.write_text("{}")
    plain.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["1"], "metadata": {}}]}))
    for given, said in (
        ("merg", "did you mean merge?"),
        (str(tmp_path / "none.ipynb"), "there is no file"),
        (str(broken), "cannot be read as a notebook"),
        (str(plain), "no cell with the tag parameters"),
    ):
        assert cli.main(["run", given, "x=1"]) == 1
        assert said in capsys.readouterr().err


def test_a_wrong_command_has_its_own_code(capsys):
    for words, said in (
        (["merg"], "no command 'merg'; did you mean merge?"),
        (["frob"], "no command 'frob'; there are: run, "),
        (["list", "--all"], "no such option: --all"),
        (["sweep", "merge", "g.yaml", "--foldr", "x"], "no such option: --foldr x; did you mean --folder?"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert cli.main([]) == 2 and "usage: rwkv-lab" in capsys.readouterr().out


def test_every_command_cleans_up_when_it_is_told_to_end(monkeypatch):
    found = []
    monkeypatch.setattr(cli, "_list", lambda given: found.append(signal.getsignal(signal.SIGTERM)) or 0)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["list"]) == 0 and signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit, match="143"):
        found[0](signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, before)  # it ignores a second one


def test_a_current_folder_that_was_deleted_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["doctor"], ["report"], ["merge", "base=b.pth"], ["train", "--help"], ["sweep", "train", "g.yaml"]):
        try:
            code = cli.main(words)
        except SystemExit as e:  # of --help
            code = e.code
        out, err = capsys.readouterr()
        assert (code, err) == ((0, "") if out else (1, "The current folder has been deleted: change to another one.\n"))
    assert cli.main(["list"]) == 0


def test_inspect_says_what_files_are(demo_folder, capsys):
    base, state = demo_folder / "demo-base.pth", demo_folder / "demo-state.pth"
    assert cli.main(["inspect", str(base), str(state), "--all"]) == 0
    shown = capsys.readouterr().out
    with open_checkpoint(base) as ck:
        assert str(ck.layout) in shown and all(f"  {name}  " in shown for name in ck.info)
    assert "kind     model\n" in shown and "kind     state" in shown


UNREADABLE = [c for c in CASES if c.number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 24)]


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda c: c.id)
def test_inspect_refuses_as_python_does(case, tmp_path, capsys):
    given = case.make(tmp_path)
    wrong = next((name for name in ("base", "tuned") if given.get(name) and refused(given[name])), None)
    if wrong is None:  # what is wrong is not in the headers of one file
        return
    assert cli.main(["inspect", str(given[wrong])]) == 1
    assert capsys.readouterr().err.strip() == refused(given[wrong]).strip()


def refused(path: str) -> str:
    try:
        with open_checkpoint(path):
            return ""
    except RwkvLabError as e:
        return f"{type(e).__name__}: {e}"


def test_completion_knows_the_parameters():
    of_merge = cli._Names(None)("al", SimpleNamespace(notebook="merge"))
    assert of_merge == ["alpha=", "allow_extra=", "allow_nonfinite=", "allowed_dir=", "allow_other_base="]
    assert cli._Names("inspect")("", SimpleNamespace()) == ["checkpoint=", "report="]


def test_completion_for_shells(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        assert "rwkv-lab" in capsys.readouterr().out


def command(*words: str, environment: dict | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    run = [sys.executable, "-m", "rwkv_lab.cli", *words]
    return subprocess.run(run, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def test_what_needs_no_torch_does_not_import_it():
    code = (
        "import sys; from rwkv_lab import cli;"
        "done = [cli.main(words) for words in (['list'], ['merge', 'x=1'], ['run', 'merg'])];"
        "print(done, [m for m in ('torch', 'numpy', 'pydantic', 'papermill', 'jinja2', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 1, 1] []", done.stderr


def test_a_refusal_starts_no_kernel(tmp_path):
    words = ["merge", "base=B.pth", "tuned=T.pth"]
    code = (
        f"import sys; from rwkv_lab import cli; done = cli.main({words});"
        "print(done, [m for m in ('torch', 'papermill', 'nbformat', 'jupyter_client', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1 []" and "there is no file" in done.stderr, done.stderr
    result = json.loads((tmp_path / "reports" / "merge" / "result.json").read_text())
    assert result["status"] == "failed" and "there is no file" in result["error"]["message"]


def test_a_run_from_words_to_report(demo_folder, warm, tmp_path):
    given = f"checkpoint={demo_folder / 'demo-base.pth'}"
    done = command("inspect", given, environment=warm.environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "reports" / "inspect"
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "ok" and (folder / "run.ipynb").is_file()
    assert f"PASS    All {len(result['checks'])} checks passed." in done.stdout
    assert f"report  {folder / 'report.html'}" in done.stdout
    report = command("report", "inspect", cwd=tmp_path)
    assert report.returncode == 0 and str(folder / "report.html") in report.stdout
    listed = command("report", cwd=tmp_path)
    assert listed.returncode == 0 and (tmp_path / "reports" / "index.html").is_file()


def test_a_run_that_is_refused(demo_folder, warm, tmp_path):
    given = "base=B.pth", f"tuned={demo_folder / 'demo-state.pth'}"
    done = command("merge", *given, environment=warm.environment, cwd=tmp_path)
    result = json.loads((tmp_path / "reports" / "merge" / "result.json").read_text())
    assert done.returncode == 1 and result["status"] == "failed" and "Traceback" not in done.stderr
    assert done.stderr.strip() == f"{result['error']['class']}: {result['error']['message']}".strip()
    assert "there is no file" in done.stderr
    assert command("report", "merge", cwd=tmp_path).returncode == 1


def test_reports_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "none"]) == 1 and "there is no folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1 and "There are no runs" in capsys.readouterr().err


def test_report_opens_a_browser(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page) or True)
    (tmp_path / "report.html").write_text("")
    (tmp_path / "result.json").write_text(json.dumps({"status": "ok", "notebook": "merge"}))
    assert cli.main(["report", str(tmp_path), "--open"]) == 0
    assert opened == [(tmp_path / "report.html").as_uri()]


def test_parameters_of_a_notebook_of_ones_own(tmp_path):
    source = "import os\nplain = 3\nname: str = 'a'  # who\nlist_of: list[int] = []\nold: str | None = None\n"
    cell = {"cell_type": "code", "source": [source], "metadata": {"tags": ["parameters"]}}
    (tmp_path / "own.ipynb").write_text(json.dumps({"cells": [cell]}))
    own = notebooks.notebook(str(tmp_path / "own.ipynb"))
    assert parameters_from(["plain=4", "name=5", "list_of=1,2"], own) == {"plain": 4, "name": "5", "list_of": "1,2"}
    with pytest.raises(ParameterError, match="own has no parameter 'nam'; did you mean name"):
        parameters_from(["nam=1"], own)
