"""Writing and comparing with threads: an interrupt ends it whenever it comes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from rwkv_lab.checkpoint import stream, write_checkpoint
from rwkv_lab.convert import verify


class Interrupted(ThreadPoolExecutor):
    """Ctrl-C comes while the third piece of work is handed out."""

    submitted = 0

    def submit(self, *arguments, **options):
        self.submitted += 1
        if self.submitted == 3:
            raise KeyboardInterrupt
        return super().submit(*arguments, **options)


def test_an_interrupt_while_tensors_are_handed_out_ends_the_writing(tmp_path, monkeypatch):
    work, raised = stream._Work(), []
    monkeypatch.setattr(stream, "ThreadPoolExecutor", Interrupted)
    monkeypatch.setattr(stream, "_Work", lambda: work)
    monkeypatch.setattr(stream, "FLUSH_FROM", 0)

    def write():
        try:
            write_checkpoint(tmp_path / "out.pth", {f"t{i}": torch.ones(4) for i in range(9)})
        except KeyboardInterrupt:
            raised.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(20)
    hangs = thread.is_alive()
    work.stop.set()  # or the process of this test would not end either
    thread.join(20)
    assert not hangs and raised and list(tmp_path.iterdir()) == []


def test_an_interrupt_while_tensors_are_handed_out_ends_the_comparison(monkeypatch):
    begun, left = threading.Event(), []

    def difference(name, *_):
        begun.set()
        left.append(name)
        assert pool.cancelled.wait(20)
        return 0.0

    class Pool(Interrupted):
        def __init__(self, workers):
            super().__init__(1)
            self.cancelled = threading.Event()
            nonlocal pool
            pool = self

        def shutdown(self, wait=True, *, cancel_futures=False):
            begun.wait(20)
            if cancel_futures:
                super().shutdown(wait=False, cancel_futures=True)
            self.cancelled.set()
            super().shutdown(wait)

    pool = None
    monkeypatch.setattr(verify, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(verify, "_difference", difference)
    pairs = {name: (SimpleNamespace(nbytes=1), None) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        verify._compared(pairs, None, "comparing")
    assert left == ["a"]  # b was waiting
