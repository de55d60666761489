"""What every notebook has in common, read from the files without running them."""

import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from rwkv_lab.workbench.parameters_cell import parameters_cell
from rwkv_lab.workbench.registry import cells_of, notebook_names, parameters_of

FOLDER = Path(__file__).parents[2] / "notebooks"
FILES = sorted(path for path in FOLDER.glob("*.ipynb") if path.stem != "index")


@pytest.fixture(params=FILES, ids=lambda p: p.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook) -> list:
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_every_job_with_parameters_has_its_notebook():
    assert set(notebook_names()) == {p.stem for p in FILES}


def test_the_index_leads_to_every_job():
    index = nbformat.read(FOLDER / "index.ipynb", as_version=4)
    nbformat.validate(index)
    text = index.cells[0].source
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", text)) == set(notebook_names())
    for notebook, given in re.findall(r"`rwkv-lab (?:run )?(\w+) (.*?)`", text):
        assert {word.partition("=")[0] for word in given.split() if "=" in word} <= {
            *parameters_of(notebook).model_fields
        }
    assert index.metadata.kernelspec.name == "python3" and not index.cells[-1].outputs


def test_no_output_is_committed(notebook):
    assert [c for c in code_cells(notebook) if c.outputs or c.execution_count is not None] == []
    assert "widgets" not in notebook.metadata


def test_kernel_is_of_the_active_environment(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook):
        if "parameters" in cell.metadata.get("tags", []):
            continue
        assert len(cell.source.splitlines()) <= 15
        tree = ast.parse(cell.source)  # fails on magics and installs, too
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]


def test_it_begins_with_a_title_and_ends_with_its_report(notebook):
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert code_cells(notebook)[-1].source.startswith("run.finish(")


def test_parameters_validate_themselves_in_the_next_cell(path, notebook):
    tagged = [i for i, c in enumerate(code_cells(notebook)) if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [0]
    assert re.search(
        rf'^run = (workbench\.)?start\("{path.stem}", globals\(\)\)$', code_cells(notebook)[1].source, re.M
    )


def test_no_cell_assigns_to_a_parameter(notebook, path):
    """An import of the same name would be validated in the parameter's place."""
    tree = ast.parse("\n".join(cell.source for cell in code_cells(notebook)[1:]))
    imported = {
        a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not (imported | assigned) & set(parameters_of(path.stem).model_fields)


def test_papermill_reads_the_parameters_as_the_model_has_them(path, capsys):
    """Names, order, defaults and help: a line that papermill cannot parse would be missing here."""
    found = papermill.inspect_notebook(str(path))
    fields = parameters_of(path.stem).model_fields
    assert list(found) == list(fields)
    for name, field in fields.items():
        assert ast.literal_eval(found[name]["default"]) == field.default
        assert found[name]["help"] == field.description
        assert found[name]["inferred_type_name"] != "None"


def test_the_parameters_cell_is_made_from_the_model(path, notebook):
    advice = f"python -m rwkv_lab.workbench.parameters_cell {path.stem}"
    assert code_cells(notebook)[0].source == parameters_cell(parameters_of(path.stem)), advice


def test_cells_do_the_steps_of_the_panel(path, notebook):
    """The Run button and the cells make the same calls, in the same order."""
    calls = [line for c in code_cells(notebook)[3:] for line in c.source.splitlines() if not line.startswith("#")]
    module = cells_of(path.stem)
    steps = [step.statement() for step in module.STEPS]
    assert calls == [*steps, f"run.finish(must_pass={module.MUST_PASS})"]
