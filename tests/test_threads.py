"""How OpenMP's threads wait: set before torch loads in every process of ours; a policy of the user stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_lab.threads import PASSIVE, VARIABLES, set_wait_policy, wait_policy

ROOT = Path(__file__).parent.parent


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Python in a process whose environment names no policy but the given one; OpenMP says what it has read."""
    kept = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "OMP_NUM_THREADS")}
    environment = kept | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"} | variables
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def spinning(done: subprocess.CompletedProcess) -> set[str]:
    """How long threads spin before they sleep, as the OpenMP libraries of a process have printed while loading."""
    lines = [
        line.split("=") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line or "KMP_BLOCKTIME" in line
    ]
    assert lines, "OpenMP printed nothing"
    return {value.strip(" '\"").removesuffix("ms") for _, value in lines}


@pytest.mark.parametrize("words", [["-m", "rwkv_lab.train", "--help"], ["-m", "rwkv_lab.bench", "--help"]])
def test_threads_wait_passively_in_processes_of_ours(words):
    assert spinning(run(*words)) == {"0"}


def test_threads_wait_passively_in_processes_that_torchrun_starts():
    """torchrun itself imports torch first, and computes nothing."""
    done = run("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "rwkv_lab.train", "--help")
    assert "0" in spinning(done)


def test_a_policy_of_the_user_stays():
    done = run("-c", "import os, rwkv_lab, torch; print(os.environ)", OMP_WAIT_POLICY="ACTIVE")
    assert "0" not in spinning(done)
    done = run("-c", "import os, rwkv_lab; print('OMP_WAIT_POLICY' in os.environ)", GOMP_SPINCOUNT="12345")
    assert done.stdout.split() == ["False"]
    done = run("-c", "import os, rwkv_lab; print('OMP_WAIT_POLICY' in os.environ)", KMP_BLOCKTIME="7")
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("first", "spin", "warnings"),
    [
        ("import torch; torch.set_num_threads(2)", True, 1),  # by default threads spin
        ("import torch; torch.set_num_threads(1)", True, 0),  # there is nothing to wait for
        ("import rwkv_lab, torch", False, 0),
    ],
)
def test_torch_that_was_there_first_is_told_once(first, spin, warnings):
    done = run("-c", f"{first}; import rwkv_lab; import rwkv_lab.model; from rwkv_lab.wkv import wkv7")
    assert done.stderr.count("torch was imported before rwkv_lab") == warnings
    assert "0" not in spinning(done) if spin else spinning(done) == {"0"}


def test_torch_that_was_there_first_with_a_policy_is_not_told():
    code = "import torch, rwkv_lab.threads; print(rwkv_lab.threads.policy_in_force())"
    done = run("-c", code, OMP_WAIT_POLICY="PASSIVE")
    assert "torch was imported before" not in done.stderr and done.stdout.strip() == "OMP_WAIT_POLICY=PASSIVE"


def test_the_policy_in_force_is_the_one_that_openmp_has_read():
    code = "import rwkv_lab.threads, os; os.environ.clear(); print(rwkv_lab.threads.policy_in_force())"
    assert run("-c", code).stdout.strip() == "OMP_WAIT_POLICY=PASSIVE"
    code = "import torch, rwkv_lab.threads as t, os; os.environ.update(t.PASSIVE); print([t.policy_in_force()])"
    assert run("-c", code).stdout.strip() == "['']"


def test_environments_of_child_processes():
    environment = {"HOME": "/"}
    assert set_wait_policy(environment) and environment == {"HOME": "/", **PASSIVE}
    assert wait_policy(environment) == "OMP_WAIT_POLICY=PASSIVE" and not set_wait_policy(environment)
    theirs = {"KMP_BLOCKTIME": "0"}
    assert not set_wait_policy(theirs) and theirs == {"KMP_BLOCKTIME": "0"}


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_import_rwkv_lab_before_anything_that_loads_torch(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    imports = [line.split()[1] for line in code.splitlines() if line.startswith(("import ", "from "))]
    ours = next(i for i, name in enumerate(imports) if name.split(".")[0] == "rwkv_lab")
    assert set(imports[:ours]) <= set(sys.stdlib_module_names)


def test_make_sets_the_policy_for_all_of_its_targets():
    assert "export OMP_WAIT_POLICY ?= PASSIVE\n" in (ROOT / "Makefile").read_text()
