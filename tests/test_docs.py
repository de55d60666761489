"""What README and docs/ show works: every command and every Python snippet is run, every link leads somewhere.

They run in a folder with tiny files under the names that the pages use. What would take minutes runs in a smaller form:
`STAND_INS` and `FEWER_STEPS` have them all.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from models import random_lora
from option_tables import pages, with_tables
from random_models import ONE_LAYER, make_layout, write_model
from tuned_files import write_fine_tune, write_state

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.merge import MERGE_METHODS

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "reports/README.md", "kernels/README.md")),
    *pages(),
]
# The snippets of CONTRIBUTING.md are files to add and trials of them; test_contributing.py follows those.
SNIPPETS = [page for page in PAGES if page.name != "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = '"$PYTHON"'  # one that starts at once
A_TEST = shlex.quote(str(ROOT / "tests" / "test_words.py"))
# (start of a command, what is run in its place)
STAND_INS = [
    (r"make (\w+).*", rf"make --directory {shlex.quote(str(ROOT))} --dry-run \1"),  # the commands in it, not run
    (r"python3 -m venv .venv", f"{shlex.quote(sys.executable)} -m venv --without-pip .venv"),
    (r"\.venv/bin/python -m pytest(.*)", f"{PYTHON} -m pytest --collect-only -q {A_TEST}"),
    (r"(?:\.venv/bin/)?papermill (.*)", rf"{PYTHON} -m papermill --no-progress-bar --log-level WARNING \1"),
    (r"torchrun (.*)", rf"{PYTHON} -m torch.distributed.run \1 --steps 1 --batch-size 2 --ctx-len 16 --no-samples"),
    (r"python -m rwkv_lab.bench models --quick", rf"{PYTHON} -m rwkv_lab.bench models --models B.pth --lengths 4 "
     "--batches 1 --rounds 1 --dtypes fp32 --peers --report bench"),
    (r"python -m rwkv_lab.bench models (--shapes.*)", rf"{PYTHON} -m rwkv_lab.bench models \1 --help"),  # likewise
    (r"python -m rwkv_lab.bench scaling(.*)", rf"{PYTHON} -m rwkv_lab.bench scaling\1 --help"),  # takes minutes
    (r"python (.*)", rf"{PYTHON} \1"),
    (r'eval "\$\(rwkv-lab (.*)\)"', rf"{PYTHON} -m rwkv_lab.cli \1"),
    (r"rwkv-lab (.*)", rf"{PYTHON} -m rwkv_lab.cli \1"),
]  # fmt: skip
RECIPE = """
merge_method: task_arithmetic
base_model: B.pth
models:
  - {model: T1.pth, parameters: {weight: 0.5}}
dtype: float32
"""
FEWER_STEPS = """
import dataclasses
from rwkv_lab.train import KINDS, compare_methods
for kind in KINDS.values():
    kind.defaults = dataclasses.replace(kind.defaults, steps=2, batch_size=2, ctx_len=32)
getattr(compare_methods, "__wrapped__", compare_methods).__kwdefaults__ |= dict(steps=1, batch_size=2, ctx_len=16)
"""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the fenced blocks in a language."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def commands(page: Path) -> list[str]:
    """The commands of a page's `sh` blocks, without comments."""
    lines = "".join(block for _, block in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*|^#.*", "", line).strip() for line in lines) if line]


@pytest.fixture(scope="module")
def files(tmp_path_factory, demo_folder) -> Path:
    """The files that the pages name, tiny."""
    folder = tmp_path_factory.mktemp("files")
    base = folder / "B.pth"
    base.write_bytes((demo_folder / "demo-base.pth").read_bytes())
    write_state(folder / "T.pth", base)
    write_fine_tune(folder / "T1.pth", base, seed=1)
    write_fine_tune(folder / "T2.pth", base, seed=2)
    with open_checkpoint(base) as ck:
        write_checkpoint(folder / "lora.pth", random_lora(ck.layout))
    write_model(folder / "M.pth", make_layout("7.0", vocab_size=260))
    write_tokenizer(folder / "20B_tokenizer.json")
    (folder / "recipe.yml").write_text(RECIPE)
    (folder / "grid.yaml").write_text(
        "grid: {alpha: [0.5, 1.0]}\nfixed: {base: B.pth, tuned: T1.pth, method: overlay}\n"
    )
    lines = [{"prompt": f"What is {i}?", "response": f" It is {i + 1} minus 1."} for i in range(200)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(files, tmp_path) -> Path:
    """A folder of one's own with those files, and what a checkout has."""
    for path in [*files.iterdir(), *(ROOT / name for name in ("notebooks", "constraints.txt", "pyproject.toml"))]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "reports").mkdir()
    return tmp_path


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def surroundings(warm) -> dict[str, str]:
    """Variables of the commands; nothing is uploaded in anybody's name."""
    python = {"PYTHON": warm.python, "PYTHON_EXEC": warm.python}  # the second: what torchrun starts
    return {**warm.environment, **python, "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}


def finished(words: list[str] | str, cwd: Path, environment: dict[str, str]) -> str:
    shell = isinstance(words, str)
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, shell=shell)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_commands(page, folder, surroundings):
    for command in commands(page):
        if re.match(r"(\.venv/bin/)?pip (un)?install ", command):
            check_pip(shlex.split(command))
            continue
        instead = next((re.sub(a, b, command) for a, b in STAND_INS if re.fullmatch(a, command)), None)
        assert instead, f"{page.name}: no way to run {command!r}; add it to STAND_INS"
        finished(instead, folder, surroundings)


def check_pip(words: list[str]) -> None:
    """Not run, it would install: its files and extras are there, and its pins are those of constraints.txt."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = re.findall(r"^\S+==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for option, value in zip(words, words[1:], strict=False):
        if option == "-c":
            assert (ROOT / value).is_file()
        if value.startswith(".") and "[" in value:
            assert set(value.rstrip("]").partition("[")[2].split(",")) <= set(extras)
        if "==" in value:
            assert value in pins


@pytest.mark.parametrize(
    "page", [page for page in SNIPPETS if blocks(page, "python")], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_python_snippets(page, folder, surroundings):
    """All of a page in one process, line numbers as on the page; without a GPU `device="cuda"` falls back."""
    lines = [""] * page.read_text().count("\n")
    for line, block in blocks(page, "python"):
        for i, text in enumerate(block.splitlines()):
            lines[line - 1 + i] = text
    if page.name == "export.md":
        make_shallow(folder)
    program = f"{FEWER_STEPS}\nexec(compile({chr(10).join(lines)!r}, {str(page)!r}, 'exec'))"
    finished([surroundings["PYTHON"], "-c", program], folder, surroundings)


def make_shallow(folder: Path) -> None:
    """One layer, since to trace one takes seconds; of the sizes that tests of the pipeline export."""
    for name in ("B.pth", "lora.pth"):
        (folder / name).unlink()
    layout = make_layout("7.0", **ONE_LAYER)
    write_model(folder / "B.pth", layout)
    write_checkpoint(folder / "lora.pth", random_lora(layout))


def test_every_block_has_a_language():
    for page in PAGES:
        assert {m[1] for m in BLOCK.finditer(page.read_text())} <= {"sh", "python", "cpp", "text", "yaml", "diff"}, page


def anchors(text: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(BLOCK, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(found.read_text()), f"{page}: {target}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_of_options_are_those_of_the_specs(page):
    assert page.read_text() == with_tables(page.read_text()), "run python tests/option_tables.py"


def test_every_merge_method_is_in_the_manual():
    text = (ROOT / "docs" / "merging.md").read_text()
    assert [m for m in MERGE_METHODS if f"`{m}`" not in text] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in pages() if f"docs/{page.name}" not in readme] == []
