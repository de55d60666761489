"""Many models, threads and forked processes one after the other: memory stays bounded, and nothing dies.

`RWKV_LAB_LOOPS=1000` makes that many models instead of forty.
"""

import gc
import os
import threading
import weakref

import pytest
import torch
from random_models import VERSIONS, load_model, make_tokens

from rwkv_lab.machine import proc
from rwkv_lab.model import RWKV_Dual, RWKVMode
from rwkv_lab.model.cpu import buffer_pool

LOOPS = int(os.environ.get("RWKV_LAB_LOOPS", "40"))
THREADS = 4


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(proc("self", "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_and_use(i: int) -> weakref.ref:
    """A model of its own size, read from and decoded with; what tells whether it is still there."""
    model = RWKV_Dual(32, 1 + i % 2, 50 + i % 7, head_size=16).requires_grad_(False)
    for mode in RWKVMode:
        model.set_mode(mode)
        state = None
        for B in (1 + i % 3, 1 + i % 3):
            _, state = model(make_tokens(B, 2, 50, i), state)
    return weakref.ref(model)


def in_threads(numbers, found: list) -> None:
    """Make and use models with these numbers on several threads."""

    def work(mine):
        found.extend(make_and_use(i) for i in mine)

    threads = [threading.Thread(target=work, args=(numbers[t::THREADS],)) for t in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_models_in_threads_are_given_back():
    found: list = []
    in_threads(range(LOOPS // 2), found)
    gc.collect()
    before = resident() if proc("self", "statm").exists() else 0
    in_threads(range(LOOPS // 2, LOOPS), found)
    gc.collect()
    assert len(found) == LOOPS and not any(model() is not None for model in found)
    # What a hundred models of this size would take, whatever the allocator keeps.
    assert not before or resident() - before < 100 * 4 * 32 * 32 * 30 + (1 << 24)


def test_blocks_of_a_few_sizes_are_kept():
    for n in range(50):
        buffer_pool.Memory(((1000 + 64 * n,), torch.float32))
    assert len(buffer_pool._free) <= buffer_pool._SIZES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_processes_compute_and_end(tmp_path):
    """Each reads a prompt and decodes, after the parent has used several threads."""
    torch.set_num_threads(2)
    try:
        for i in range(max(LOOPS // 20, 2)):
            model, tokens = load_model(tmp_path, VERSIONS[i % len(VERSIONS)]), make_tokens(2, 9)
            read = model(tokens)[0]
            model.set_mode(RWKVMode.RNN)
            expected = model(tokens)[0]
            child = os.fork()
            if child == 0:
                same = torch.equal(model(tokens)[0], expected)
                model.set_mode(RWKVMode.TRANSFORMER)
                torch.set_num_threads(1)  # torch's own products would wait for threads that stayed in the parent
                os._exit(0 if same and torch.allclose(model(tokens)[0], read, atol=1e-5) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
