"""Runs notebooks as users run them: as processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
from warm_kernels import warm_kernels

ROOT = Path(__file__).parents[2]
# papermill's own command without a package whose import takes a second, and which checks what no notebook holds.
PAPERMILL = "import sys\nsys.modules['rfc3987_syntax'] = None\nfrom papermill.cli import papermill\npapermill()\n"


@dataclass(frozen=True)
class Batch:
    """A finished papermill run."""

    code: int  # of the process
    log: str  # stdout and stderr
    notebook: Path  # as executed
    folder: Path  # of the report

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    def output_of(self, source: str) -> str:
        """What the cell whose source holds this text printed."""
        cells = json.loads(self.notebook.read_text())["cells"]
        (cell,) = [c for c in cells if c["cell_type"] == "code" and source in "".join(c["source"])]
        return "".join("".join(o.get("text", "")) for o in cell["outputs"])


@pytest.fixture(scope="session")
def environment(demo_folder) -> dict[str, str]:
    """For processes: the checkout before any installed copy, one thread, the tiny demo model."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RWKV_LAB_DEMO": str(demo_folder)}


@pytest.fixture(scope="session")
def warm(environment) -> dict[str, str]:
    """The same, where kernels start at once. `environment` starts them as users do, which takes seconds."""
    with tempfile.TemporaryDirectory() as folder, warm_kernels(Path(folder), environment) as warm:  # a short path
        yield warm


@pytest.fixture(scope="session")
def batch(warm, tmp_path_factory):
    """batch("merge", "-p", "alpha", "nan") -> Batch, by papermill."""
    papermill = tmp_path_factory.mktemp("command") / "papermill"
    papermill.write_text(PAPERMILL)

    def run(
        notebook: str, *options: str, cwd: Path = ROOT, variables: Mapping[str, str] = MappingProxyType({})
    ) -> Batch:
        folder = tmp_path_factory.mktemp(notebook)
        executed = folder / "run.ipynb"
        command = [
            sys.executable,
            papermill,
            "--no-progress-bar",
            ROOT / "notebooks" / f"{notebook}.ipynb",
            executed,
        ]
        done = subprocess.run(
            [*command, "-r", "report", str(folder / "report"), *options],
            cwd=cwd,
            env={**warm, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Batch(done.returncode, done.stdout + done.stderr, executed, folder / "report")

    return run


@pytest.fixture(scope="session")
def merged(batch) -> Batch:
    """merge.ipynb, run on its defaults."""
    return batch("merge")
