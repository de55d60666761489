"""Long use: tokens with states saved and loaded, notebooks in a row; memory, threads, files and processes stay."""

import os
import subprocess
import tempfile
import threading
from pathlib import Path
from unittest.mock import patch

import torch

from rwkv_lab.machine import memory_of
from rwkv_lab.model import RWKV_Dual, generate_stream, load_state, save_state
from rwkv_lab.resources import notebooks_folder

EACH = 500  # tokens between two states that are saved and loaded
MORE = 30 * 2**20  # bytes of memory that may be in use more at the end: what allocators keep


def run_tokens(count: int, folder: Path, seed: int = 0) -> tuple[str, list[str]]:
    """A text of so many tokens, in parts that begin from a state on the disk."""
    from random_models import make_layout, write_model

    path = write_model(folder / "model.pth", make_layout("7.0", head_size=32, n_head=2, vocab_size=256))
    model = RWKV_Dual.from_pretrained(path).eval()
    stream = generate_stream(model, "a", EACH, seed=seed)
    used, threads, done, wrong = [], [], 0, []
    while done < count:
        done += sum(1 for _ in stream)
        save_state(folder / "state.safetensors", stream.state, model, overwrite=True)
        state = load_state(folder / "state.safetensors", model)
        if not all(
            torch.equal(a, b) for a, b in zip(state.tensors().values(), stream.state.tensors().values(), strict=True)
        ):
            wrong.append(f"after {done} tokens: the state that was loaded is not the one that was saved")
        stream = generate_stream(model, "", EACH, seed=seed + done, state=state, logits=stream.logits)
        used.append(memory_of("RssAnon") or 0)
        threads.append(threading.active_count())
    warm = used[len(used) // 10]
    if used[-1] - warm > MORE:
        wrong.append(f"memory grew by {(used[-1] - warm) / 2**20:.0f} MiB")
    if threads[-1] > threads[0]:
        wrong.append(f"threads grew from {threads[0]} to {threads[-1]}")
    return f"{done} tokens, {len(used)} states saved and loaded: {(used[-1] - warm) / 2**20:+.1f} MiB", wrong


def run_notebooks(count: int, folder: Path, seed: int = 0) -> tuple[str, list[str]]:
    """inspect.ipynb by papermill in one process, again and again."""
    import papermill
    from random_models import make_layout, write_model

    path = write_model(folder / "model.pth", make_layout("7.0", head_size=32, n_head=2, vocab_size=256))
    used, files, processes, wrong = [], [], [], []
    own = folder / "temporary"  # other programs use the usual place
    own.mkdir()
    for _ in range(count):
        with patch.dict(os.environ, TMPDIR=str(own)), patch.object(tempfile, "tempdir", str(own)):
            papermill.execute_notebook(
                notebooks_folder() / "inspect.ipynb",
                folder / "run.ipynb",
                {"checkpoint": str(path), "report": str(folder / "report")},
                progress_bar=False,
                cwd=str(folder),
            )
        used.append(memory_of("RssAnon") or 0)
        files.append(len(os.listdir(own)) + len(os.listdir("/proc/self/fd")))
        processes.append(len(subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True).stdout.split()))
    middle = count // 2
    if used[-1] - used[middle] > MORE:
        wrong.append(f"memory grew by {(used[-1] - used[middle]) / 2**20:.0f} MiB from run {middle} on")
    if files[-1] > files[middle] or processes[-1] > processes[0]:
        wrong.append(
            f"files grew from {files[middle]} to {files[-1]}, processes from {processes[0]} to {processes[-1]}"
        )
    return f"{count} notebooks: {(used[-1] - used[middle]) / 2**20:+.1f} MiB, {processes[-1]} processes left", wrong
