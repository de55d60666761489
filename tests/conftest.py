"""What holds for all tests."""

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from skips import pytest_configure  # noqa: F401  a skip that SKIPS.md does not have fails the run
from warm_python import IN_FULL, Warm, do_less, warm_in, warm_python

# Everything here is tiny: a second thread would only wait for the first, and spin while other processes need the core.
# Processes that tests start take the variable; tests of threads set their own number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# As in rwkv_lab.workbench.batch: it checks what no notebook holds, and its import takes a second.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

# What is imported and collected stays to the end: garbage is looked for among what tests make, and less often, since
# what exports import then is as much again.
gc.disable()
gc.set_threshold(10_000, 20, 20)


do_less()

_SERVER = pytest.StashKey[Path]()  # the folder of the process that processes of tests are forked from


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes as users have them."""
    from rwkv_lab.train import data

    for name, value in IN_FULL.items():
        monkeypatch.setattr(name, value)
    for made_once in (data._english, data._python):
        made_once.cache_clear()
    yield
    for made_once in (data._english, data._python):
        made_once.cache_clear()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


# Files and folders whose tests take longest. `make test` gives whole files to its processes in this order: one that
# began last would run alone at the end.
LONGEST_FIRST = ("test_docs.py", "test_wrong_types.py", "test_contributing.py", "notebooks", "export", "train", "wkv")


# Files that share what takes long to make run in one process: exported models, a run of merge.ipynb.
TOGETHER = {
    "exported": re.compile(
        r"tests/export/test_(onnx_\w+|format_exporter|tensorrt|linear_attention|repeated_layers|pipeline)\.py"
    ),
    "merged": re.compile(r"tests/notebooks/test_(papermill|nbval)\.py"),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, as `--dist loadfile`, but for those of TOGETHER."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((name for name, files in TOGETHER.items() if files.fullmatch(file)), file)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


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


@pytest.fixture(scope="session")
def environment(demo_folder) -> dict[str, str]:
    """For processes: the checkout before any installed copy, one thread, the tiny demo model."""
    return _for_processes(demo_folder)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """With `pytest -n`: what its processes start is forked from one server, so that modules are imported once."""
    node.workerinput["warm"] = str(_server_folder(node.config))


def _server_folder(config: pytest.Config) -> Path:
    """Where the server of this run listens, which ends with it."""
    if _SERVER not in config.stash:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # a short path
        stack.enter_context(warm_python(folder, _for_processes()))
        config.stash[_SERVER] = folder
    return config.stash[_SERVER]


@pytest.fixture(scope="session")
def warm(demo_folder, pytestconfig) -> Warm:
    """Processes that start at once, in the same. With `environment` they start as users' do, which takes seconds."""
    folder = getattr(pytestconfig, "workerinput", {}).get("warm") or _server_folder(pytestconfig)
    warm = warm_in(Path(folder), _for_processes(demo_folder))
    subprocess.run([warm.python, "-c", ""], env=warm.environment, check=True)  # it imports now, in no test's time
    return warm


@pytest.fixture
def warm_children(warm) -> Iterator[None]:
    """Processes that rwkv_lab starts from a test start at once, too."""
    with warm.for_children():
        yield


def _for_processes(demo_folder: Path | None = None) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")) if p)
    demo = {} if demo_folder is None else {"RWKV_LAB_DEMO": str(demo_folder)}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **demo}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright; while it is open, an event loop runs in this thread."""
    if (executable := shutil.which("chromium")) is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
