"""Interrupted or killed at any moment, out of space, or two at once: inputs and older outputs stay, nothing is left."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from models import random_model, random_state, snapshot
from slow_merge import MOMENTS, start

from rwkv_lab import merge
from rwkv_lab.checkpoint import output_checks, stream
from rwkv_lab.errors import OutputError


@pytest.fixture
def files(tmp_path):
    """Arguments of a merge, and the bytes that it should write."""
    torch.save(random_model(), tmp_path / "base.pth")
    torch.save(random_state(), tmp_path / "state.pth")
    given = {"base": tmp_path / "base.pth", "tuned": tmp_path / "state.pth", "out": tmp_path / "out.pth"}
    merge(**given)
    wanted = given["out"].read_bytes()
    for name in ("out.pth", "out.pth.json"):
        (tmp_path / name).unlink()
    return given, wanted


def stop(process, pipe, sign) -> int:
    assert pipe.poll(60) and pipe.recv() == "here"
    os.kill(process.pid, sign)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older one"])
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_leaves_the_old_or_the_new_and_never_a_half(moment, sign, older, files, tmp_path):
    given, wanted = files
    if older:
        given["out"].write_text("older output")
    before = snapshot(tmp_path)
    assert stop(*start(moment, given | {"overwrite": older}), sign) != 0
    after = snapshot(tmp_path)
    published = moment in ("linked", "published")
    if published:
        assert given["out"].read_bytes() == wanted
    else:
        assert after.get("out.pth") == before.get("out.pth")
    assert {n: after[n] for n in ("base.pth", "state.pth")} == {n: before[n] for n in ("base.pth", "state.pth")}
    left = set(after) - set(before) - {"out.pth"}
    if sign == signal.SIGINT:
        assert left == set()  # it had the time to clean up
    merge(**given, overwrite=older or published)  # and the next run does it in any case
    assert set(snapshot(tmp_path)) == {"base.pth", "state.pth", "out.pth", "out.pth.json"}
    assert given["out"].read_bytes() == wanted


def test_disk_full_in_the_middle(files, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails the same way, half done."""
    given, wanted = files
    before = snapshot(tmp_path)
    process, pipe = start("at once", given, limit=len(wanted) // 2)
    assert pipe.poll(60)
    assert pipe.recv().startswith(f"OutputError: cannot write {given['out']}: File too large; nothing was left behind")
    process.join(60)
    assert process.exitcode == 1 and snapshot(tmp_path) == before


def test_a_disk_that_is_really_full(files, tmp_path, monkeypatch):
    given, _ = files
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", small], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted: this user may not")
    try:
        with pytest.raises(OutputError, match="needs .* are free on that disk"):
            merge(**given | {"out": small / "out.pth"})
        monkeypatch.setattr(output_checks, "disk_free", lambda folder: 1 << 40)
        with pytest.raises(OutputError, match="No space left on device; nothing was left behind"):
            merge(**given | {"out": small / "out.pth"})
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_no_space_is_refused_by_the_plan(files, tmp_path, monkeypatch, reads):
    given, wanted = files
    before = snapshot(tmp_path)
    for what, value, said in [
        ("disk_free", lambda folder: len(wanted) // 2, r"needs 35\.\d kB, 17\.\d kB are free"),
        ("memory_free", lambda: 1000, "of memory"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(output_checks, what, value)
            reads.clear()
            with pytest.raises(OutputError, match=said):
                merge(**given, hash="sha256")
            assert (
                sum(end - start for _, start, end in reads) < 30_000 < len(wanted)
            )  # no file was read whole for a hash
    assert snapshot(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(output_checks, "disk_free", lambda folder: len(wanted))
        merge(**given)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_merges_to_one_output_at_once(overwrite, files, tmp_path):
    given, wanted = files
    runs = [start("never", given | {"overwrite": overwrite}) for _ in range(2)]
    said = []
    assert all(pipe.poll(60) and pipe.recv() == "here" for _, pipe in runs)  # both write now
    for process, pipe in runs:
        assert pipe.poll(60)
        said.append(pipe.recv())
        process.join(60)
    if overwrite:
        assert said == ["done", "done"]
    else:
        assert sorted(s.split(" ")[0] for s in said) == ["OutputError:", "done"], said
    assert given["out"].read_bytes() == wanted
    assert set(os.listdir(tmp_path)) == {"base.pth", "state.pth", "out.pth", "out.pth.json"}


def test_an_error_in_one_thread_stops_the_others_and_is_the_one_that_is_told(files, tmp_path, monkeypatch):
    given, _ = files
    before = snapshot(tmp_path)
    real, count = stream._write, [0]

    def failing(*args):
        count[0] += 1
        if count[0] == 20:
            raise OSError(5, "Input/output error")
        time.sleep(0.005)
        real(*args)

    monkeypatch.setattr(stream, "_write", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        merge(**given)
    assert count[0] < 40 and snapshot(tmp_path) == before
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]
