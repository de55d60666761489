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
