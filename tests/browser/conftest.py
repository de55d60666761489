"""One JupyterLab for the tests of a module."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.lab import QUICK, WAIT, Lab, copy_project, jupyter_lab, screenshot
from warm_python import warm_python


@pytest.fixture(scope="module")
def lab(environment, tmp_path_factory) -> Iterator[Lab]:
    """`make lab` in a copy of the project, with the tiny demo model, and kernels that start at once."""
    project = tmp_path_factory.mktemp("project")
    copy_project(project, QUICK)
    variables = environment | {"PYTHONPATH": str(project)}
    with tempfile.TemporaryDirectory() as folder, warm_python(Path(folder), variables) as warm:  # a short path
        with jupyter_lab(project, warm.environment) as lab:
            yield lab


@pytest.fixture
def page(chromium, lab: Lab, request):
    """A page of 1280 px, photographed at the end, after which the lab is as at first but for its reports.

    An error in the page's console fails the test.
    """
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, said = context.new_page(), []
    page.set_default_timeout(WAIT * 1000)
    context.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: said.append(str(error.error)))
    yield page
    screenshot(page, request.node.name)
    context.close()
    lab.start_afresh()
    assert said == []
