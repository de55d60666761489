"""Runs notebooks as users run them: as processes of their own."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
from warm_python import Warm

ROOT = Path(__file__).parents[2]


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
def batch(warm: Warm, tmp_path_factory):
    """batch("merge", "-p", "alpha", "nan") -> Batch, by papermill."""

    def run(
        notebook: str, *options: str, cwd: Path = ROOT, variables: Mapping[str, str] = MappingProxyType({})
    ) -> Batch:
        folder = tmp_path_factory.mktemp(notebook)
        executed = folder / "run.ipynb"
        command = [
            warm.python,
            "-m",
            "papermill",
            "--no-progress-bar",
            ROOT / "notebooks" / f"{notebook}.ipynb",
            executed,
        ]
        done = subprocess.run(
            [*command, "-r", "report", str(folder / "report"), *options],
            cwd=cwd,
            env={**warm.environment, **variables},
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
