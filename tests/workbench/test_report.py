"""The report is one file, offline, escaped, and silent about the disk it came from."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from random_models import make_layout, write_model

from rwkv_lab.checkpoint import FileFacts
from rwkv_lab.checks import Check
from rwkv_lab.errors import CorruptFileError
from rwkv_lab.workbench.next_steps import next_steps
from rwkv_lab.workbench.pages import without_folders
from rwkv_lab.workbench.registry import notebook_names, parameters_of
from rwkv_lab.workbench.report import Page, Picture, Sample, write_report
from rwkv_lab.workbench.result import NotApplicable, Record
from rwkv_lab.workbench.tables import Table

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 1111 * 1111 }}\u202e\x1b[31m"


@pytest.fixture
def page() -> str:
    home = Path("/home/ada lovelace/models")
    record = Record(Path("/home/ada lovelace/reports/x"), "merge", {"base": str(home / "base one.pth"), EVIL: EVIL})
    record.inputs = [FileFacts(home / "base one.pth", 12, "records:" + "0" * 64)]
    record.checks = [Check(EVIL, EVIL, 0, False), Check("ok", 1.25, 2, True), NotApplicable("maybe", EVIL)]
    record.status, record.error = "failed", CorruptFileError(f"{home}/base one.pth and /root/secret/other.pth: {EVIL}")
    content = Page(
        "merge",
        headline=EVIL,
        summary=EVIL,
        facts=[(EVIL, EVIL)],
        pictures=[Picture(EVIL, EVIL, b"\x89PNG", b"\x89PNG", "x")],
        samples=[Sample(EVIL, {EVIL: EVIL})],
        tables=[Table(EVIL, (EVIL, "n"), [(EVIL, 3)], EVIL)],
    )
    return content, record


def render(page, tmp_path) -> str:
    write_report(tmp_path / "report.html", *page, can_repeat=True)
    return (tmp_path / "report.html").read_text()


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_from_a_checkpoint_becomes_markup(page, tmp_path):
    text = render(page, tmp_path)
    tags = Tags(text).found
    assert "script" not in {tag for tag, _ in tags}
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    assert [attrs["src"][:22] for tag, attrs in tags if tag == "img"] == ["data:image/png;base64,"]
    assert "{{ 1111 * 1111 }}" in text and "1234321" not in text
    assert "\u202e" not in text and "\x1b" not in text


def test_it_needs_no_network(page, tmp_path):
    text = render(page, tmp_path)
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(|<link", text)


def test_no_folder_is_told(page, tmp_path):
    text = render(page, tmp_path)
    assert "base one.pth" in text and "other.pth" in text
    for told in ("ada", "lovelace", "/root", "secret", "/home"):
        assert told not in text


def test_paths_are_cut_and_other_slashes_are_not():
    assert without_folders("see /a/b/c.pth, ~/x/y.pth; 3/4 of a / b [H/V] notebooks/merge.ipynb 5 MB/s", []) == (
        "see c.pth, y.pth; 3/4 of a / b [H/V] notebooks/merge.ipynb 5 MB/s"
    )


def test_figures_follow_light_and_dark(page, tmp_path):
    page[0].pictures[:] = [Picture("one", "", b"light", b"dark", "one")]
    tags = Tags(render(page, tmp_path)).found
    sources = [attrs for tag, attrs in tags if tag == "source"]
    assert [s["media"] for s in sources] == ["(prefers-color-scheme: dark)"]
    assert base64.b64decode(sources[0]["srcset"].partition(",")[2]) == b"dark"
    assert [attrs["src"].partition(",")[2] for tag, attrs in tags if tag == "img"] == [
        base64.b64encode(b"light").decode()
    ]


def test_checks_are_folded_unless_one_fails(page, tmp_path):
    content, record = page
    record.status, record.error = "ok", None
    assert "<details open><summary>1 of 2 checks failed" in render(page, tmp_path)
    record.checks = [check for check in record.checks if isinstance(check, Check) and check.passed]
    assert "<details><summary>The check passed." in render(page, tmp_path)


def test_the_conclusion_comes_first(page, tmp_path):
    content, record = page
    content.headline, content.summary = "merged.pth of base.pth.", "3.0 to 2.0 bits per byte."
    text = render(page, tmp_path)
    assert (
        text.index("3.0 to 2.0")
        < text.index("merged.pth of base.pth")
        < text.index("checks failed")
        < text.index("<figure")
    )


def test_it_leads_on_to_the_notebooks_that_take_the_output(tmp_path):
    out = tmp_path / "merged here.pth"
    write_model(out, make_layout("7.0"))
    record = Record(tmp_path, "merge", {"base": "/elsewhere/base.pth"}, status="ok")
    record.outputs = [FileFacts(out, 12, "")]
    steps = dict(next_steps(record))
    assert steps["See what is in it"] == "rwkv-lab run inspect 'checkpoint=merged here.pth' report=../inspect"
    assert not any("merge " in command for command in steps.values())
    record.notebook, record.parameters["kind"] = "train", "full"
    steps = dict(next_steps(record))
    assert (
        steps["Merge it into its base"]
        == "rwkv-lab run merge 'tuned=merged here.pth' base=PATH/base.pth report=../merge"
    )
    assert (
        steps["Check that its parallel and its recurrent mode agree"]
        == "rwkv-lab run modes 'model=merged here.pth' report=../modes"
    )
    state = tmp_path / "state.pth"
    torch.save({"blocks.0.att.time_state": torch.zeros(2, 32, 32)}, state)
    record.notebook, record.outputs = "train", [FileFacts(state, 12, "")]
    assert (
        dict(next_steps(record))["Merge it into its base"]
        == "rwkv-lab run merge tuned=state.pth base=PATH/base.pth report=../merge"
    )
    record.folder, record.cwd = tmp_path / "reports" / "x", tmp_path
    assert (
        dict(next_steps(record))["See what is in it"]
        == "rwkv-lab run inspect checkpoint=../../state.pth report=../inspect"
    )
    record.status = "failed"
    assert next_steps(record) == []


@pytest.mark.parametrize("notebook", notebook_names())
def test_what_a_notebook_says_it_takes_it_takes(notebook):
    model = parameters_of(notebook)
    assert bool(model.takes_kinds) == bool(model.takes_output) == bool(model.purpose)
    assert not model.takes_output or model.takes_output in model.model_fields


def test_verdict_and_checks(page, tmp_path):
    text = render(page, tmp_path)
    assert text.count('class="badge FAIL"') == 2 and text.count('class="badge PASS"') == 1  # headline and one check
    assert '<span class="badge">n/a</span>' in text and "CorruptFileError" in text


def test_tables_in_a_notebook_are_escaped():
    table = Table(EVIL, ("x",), [(EVIL,)], EVIL)
    assert {tag for tag, _ in Tags(table._repr_html_()).found} == set("p b div table thead tbody tr th td".split())
    assert "\u202e" not in repr(Table("", ("x",), [(EVIL,)]))


def test_words_in_a_column_of_numbers_stand_with_the_numbers(page, tmp_path):
    table = Table("t", ("part", "share"), [("ffn", "new"), ("att", 0.5)])
    assert table.of_numbers() == [False, True]
    assert table._repr_html_().count("text-align: right") == 3  # the name of the column, the word, the number
    text = render((Page("x", tables=[table]), page[1]), tmp_path)
    assert '<td data-label="share" class="among">new</td>' in text and '<th class="number">share</th>' in text


def test_cells_of_several_lines_stay_in_their_column_of_a_log():
    table = Table("Samples", ("base", "merged"), [("one\ntwo", "three"), ("", "a\n\nb")])
    assert repr(table).split("\n") == ["Samples", "base  merged", "one   three", "two", "      a", "", "      b"]
    assert repr(Table("The plan", ("", ""), [("size", "3 MB")])) == "The plan\nsize  3 MB"


def test_a_long_table_is_cut_in_a_log():
    assert "… and 60 more rows" in repr(Table("t", ("x",), [(i,) for i in range(100)]))
