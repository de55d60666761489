"""What holds for all tests."""

import os
from pathlib import Path

import pytest
import torch
from skips import pytest_configure  # noqa: F401  a skip that SKIPS.md does not have fails the run

# Everything here is tiny: a second thread would only wait for the first, and spin while other processes need the core.
# Processes that tests start take the variable; tests of threads set their own number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


# Files and folders whose tests take longest. `make test` gives whole files to its processes in this order: one that
# began last would run alone at the end.
LONGEST_FIRST = ("test_docs.py", "test_wrong_types.py", "test_contributing.py", "notebooks", "export", "train", "wkv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONGEST_FIRST) if name in item.path.parts), len(LONGEST_FIRST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """A folder with a tiny demo model and its state, a few steps old; notebooks find them there, too."""
    from rwkv_lab.train import train

    folder = tmp_path_factory.mktemp("demo")
    base, state = folder / "demo-base.pth", folder / "demo-state.pth"
    short = {"steps": 2, "batch_size": 2, "ctx_len": 64}
    train("pretrain", out=base, n_embd=32, n_layer=2, head_size=16, **short)
    train("state", out=state, base=base, **short)
    before = os.environ.get("RWKV_LAB_DEMO")
    os.environ["RWKV_LAB_DEMO"] = str(folder)
    yield folder
    os.environ.pop("RWKV_LAB_DEMO")
    if before is not None:
        os.environ["RWKV_LAB_DEMO"] = before
