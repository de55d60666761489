"""An output appears whole or not at all, whatever happens on the way."""

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import snapshot

from rwkv_lab.checkpoint import atomic, open_checkpoint, write_checkpoint, write_text
from rwkv_lab.checkpoint.atomic import atomic_file, atomic_folder
from rwkv_lab.errors import OutputError

W = {"w": torch.ones(4)}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("what", [atomic_file, atomic_folder])
def test_an_exception_leaves_everything_as_it_was(what, older, tmp_path):
    target = tmp_path / "x"
    if older and what is atomic_folder:
        target.mkdir()
        (target / "a").write_text("old")
    elif older:
        target.write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(Interrupted), what(target, overwrite=True) as made:
        if what is atomic_file:
            os.write(made, b"half")
        else:
            (made / "half").write_text("half")
        raise Interrupted
    assert snapshot(tmp_path) == before


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    with atomic_file(target, overwrite=True) as fd:
        os.write(fd, b"new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("links", [True, False])
def test_a_target_that_appears_meanwhile_is_left_alone(links, tmp_path, monkeypatch):
    if not links:

        def refuse(*args):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="another process"), atomic_file(tmp_path / "x", overwrite=False):
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs" and os.listdir(tmp_path) == ["x"]
    with atomic_file(tmp_path / "y", overwrite=False) as fd:
        os.write(fd, b"ours")
    assert (tmp_path / "y").read_text() == "ours" and sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    target, other = tmp_path / "x", tmp_path / "y"
    code = (
        "import sys, os, signal; from pathlib import Path; from rwkv_lab.checkpoint.atomic import *\n"
        "with atomic_file(Path(sys.argv[1]), False), atomic_folder(Path(sys.argv[2]), False):\n"
        "    print('in', flush=True)\n    sys.stdin.readline()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, target, other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "in\n"
        held = set(os.listdir(tmp_path))
        assert len(held) == 2
        write_text(target, "ours", overwrite=False)
        write_checkpoint(other, W, max_shard_size=1)
        assert held < set(os.listdir(tmp_path))
        child.kill()
    assert child.wait() < 0
    write_text(target, "again", overwrite=True)
    write_checkpoint(other, W, max_shard_size=1, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_files_of_others_are_never_taken_for_leftovers(tmp_path):
    mine = [".x", ".x.backup", "x.rwkv_lab-partial", ".xy.0.rwkv_lab-partial", ".x.0.rwkv_lab-partial.pth"]
    for name in mine:
        (tmp_path / name).write_text("keep")
    (tmp_path / ".x.0.rwkv_lab-partial").symlink_to(tmp_path / ".x")
    write_text(tmp_path / "x", "", overwrite=False)
    assert all((tmp_path / name).read_text() == "keep" for name in mine)


@pytest.mark.parametrize("what", [atomic_file, atomic_folder])
def test_a_temporary_that_another_process_cleared_away_before_it_was_locked(what, tmp_path, monkeypatch):
    """Between making it and locking it, it looks like one of a dead process."""
    real, calls = fcntl.flock, []

    def flock(fd, operation):
        calls.append(operation)
        if len(calls) == 1:
            atomic.remove_stale(tmp_path / "x")
            assert os.listdir(tmp_path) == []
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with what(tmp_path / "x", overwrite=False):
        pass
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_is_replaced_whole(tmp_path):
    write_checkpoint(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(3)}, max_shard_size=1)
    write_checkpoint(tmp_path / "x", W, max_shard_size=1, overwrite=True)
    with open_checkpoint(tmp_path / "x") as ck:
        assert list(ck) == ["w"]
    assert len(list((tmp_path / "x").iterdir())) == 2 and os.listdir(tmp_path) == ["x"]
    with pytest.raises(OutputError, match="exists"):
        write_checkpoint(tmp_path / "x", W, max_shard_size=1)


@pytest.mark.parametrize("killed", [True, False])
def test_an_older_folder_survives_the_moment_of_its_replacement(killed, tmp_path, monkeypatch):
    """Two renames are needed; between them the older folder has no name."""
    target = tmp_path / "x"
    write_checkpoint(target, W, max_shard_size=1)
    before = snapshot(tmp_path)
    rename, count = type(target).rename, [0]

    def second_fails(self, to):
        count[0] += 1
        if count[0] == 2:
            raise Interrupted
        if count[0] == 3 and killed:
            os._exit(9)
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", second_fails)
    if killed:
        pid = os.fork()
        if pid == 0:
            write_checkpoint(target, W, max_shard_size=1, overwrite=True)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert not target.exists()
        with pytest.raises(OutputError, match="exists"):  # the next run finds the older folder where it was
            monkeypatch.undo()
            write_checkpoint(target, W, max_shard_size=1)
    else:
        with pytest.raises(Interrupted):
            write_checkpoint(target, W, max_shard_size=1, overwrite=True)
    assert snapshot(tmp_path) == before


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "x")
    for path, said in [("missing/x", "Create it first"), ("file/x", "is a file"), ("dangling", "link to a file")]:
        with pytest.raises(OutputError, match=said):
            write_text(tmp_path / path, "", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_a_folder_that_is_not_writable(tmp_path, monkeypatch):
    """root may write everywhere: the system's answer is put in place of its check."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(OutputError, match="not writable"):
        write_text(tmp_path / "x", "", overwrite=False)
    monkeypatch.undo()
    real = os.open

    def read_only(path, flags, *rest):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OutputError, match="Read-only file system"):
        write_text(tmp_path / "x", "", overwrite=False)


def test_names_as_long_as_the_file_system_takes(tmp_path):
    for name in ("x" * 251 + ".pth", "日" * 83 + ".pth"):  # 255 and 253 bytes
        write_checkpoint(tmp_path / name, W)
        assert (tmp_path / name).is_file()


def test_it_reaches_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    write_text(tmp_path / "x", "x", overwrite=False)
    write_text(tmp_path / "x", "y", overwrite=True)
    assert order == ["fsync", "link", "fsync", "fsync", "replace", "fsync"]


def test_writers_that_replace_one_folder_at_once(tmp_path):
    """Each ends well; one of their folders is there, whole, and nothing beside it."""
    target = tmp_path / "x"

    def write(number: int) -> None:
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "a").write_text(str(number))

    with ThreadPoolExecutor(3) as pool:
        for _ in range(30):  # without another try, one in five fails
            list(pool.map(write, range(3)))
    assert (target / "a").read_text() in ("0", "1", "2") and os.listdir(tmp_path) == ["x"]
