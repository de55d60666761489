"""Output that appears whole or not at all: a temporary beside the target, fsync, rename.

A temporary is locked (`flock`) while its process lives. Whoever writes to the same target next removes the ones that
no process has locked any more, so that a killed run leaves nothing behind for long.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rwkv_lab.errors import OutputError

_MARK = ".rwkv_lab-partial"
_PREVIOUS = ".rwkv_lab-previous"  # a folder that is just being replaced
_THERE = (errno.ENOTEMPTY, errno.EEXIST)  # of renaming a folder to where there is one


@contextmanager
def atomic_file(path: Path, overwrite: bool) -> Iterator[int]:
    """A file descriptor to write to, which becomes `path` when the block ends well; permissions follow the umask.

    Raises:
        OutputError: `path` exists and may not be overwritten, or its folder cannot be written to.
    """
    remove_stale(path)
    check_target(path, overwrite)
    temporary, fd = _create(path, lambda t: os.open(t, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        with _os_errors(path):
            yield fd
            os.fsync(fd)
            _publish(temporary, path, overwrite)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder to write into, which becomes `path` when the block ends well. Files in it must be synced.

    Raises:
        OutputError: as for `atomic_file`.
    """
    remove_stale(path)
    check_target(path, overwrite)
    temporary, fd = _create(path, _make_folder)
    try:
        with _os_errors(path):
            yield temporary
            os.fsync(fd)
            if overwrite and not path.is_file():
                _swap(temporary, path)
            else:
                check_target(path, overwrite)  # others may have made it meanwhile
                while not _moved(temporary, path, *_THERE):
                    check_target(path, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(fd)
    _sync_folder(path.parent)


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder for what is needed until the block ends, beside where `path` would be. What a killed process leaves is
    removed when the next one is made for the same `path`.

    Raises:
        OutputError: its folder cannot be written to.
    """
    remove_stale(path)
    temporary, fd = _create(path, _make_folder)
    try:
        inside = temporary / "work"  # `one_writer` locks the folder that it writes into, and `temporary` is locked
        inside.mkdir()
        yield inside
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(fd)


@contextmanager
def one_writer(path: Path, companion: Path, overwrite: bool) -> Iterator[Callable[[], None]]:
    """For an output and a file beside it that describes it: they always belong together, whoever else writes them.

    Yields what to call right before `path` is published. From then to the end of the block no other process publishes
    into this folder, and an older companion is gone, so that a kill in between leaves `path` without one.

    Raises:
        OutputError: by the callback, `companion` exists and may not be overwritten.
    """
    with ExitStack() as locks:

        def before_publishing() -> None:
            fd = os.open(path.parent, os.O_RDONLY)
            locks.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
            check_target(companion, overwrite)
            companion.unlink(missing_ok=True)

        yield before_publishing


def by_final_names(text: str) -> str:
    """A message with outputs by the names that they would have had, not those of the temporaries that it names."""
    return re.sub(rf"\.([^/\n]+)\.[0-9a-f]{{12}}{re.escape(_MARK)}", r"\1", text)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a target that exists (unless `overwrite`) or whose folder is not there or not writable.

    Raises:
        OutputError: names it.
    """
    if path.is_symlink() and not path.exists():
        raise OutputError(f"{path} is a link to a file that is not there. Remove it or name another output.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Choose another output, or pass overwrite=True.")
    folder = path.parent
    if not folder.exists():
        raise OutputError(f"the folder {folder} is not there. Create it first.")
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, so nothing can be written into it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {folder} is not writable for this user")


def refuse_inputs(path: Path, inputs: Iterable[tuple[Path, os.stat_result]]) -> None:
    """Refuse a target that is one of the inputs (each with its `os.stat`), by whatever alias.

    Raises:
        OutputError: names it.
    """
    if not path.exists():
        return
    target = os.stat(path)
    for source, stat in inputs:
        if os.path.samestat(target, stat):
            raise OutputError(f"{path} is the input {source}, under this or another name; inputs are never written to")


def _temporary(path: Path, mark: str = _MARK) -> Path:
    return path.with_name(f"{_head(path)}{secrets.token_hex(6)}{mark}")


def _head(path: Path) -> str:
    return f".{path.name[:50]}."  # 50 characters are at most 200 bytes, of the 255 that a name may have


def _create(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """A new temporary and its descriptor, locked."""
    with _os_errors(path):
        while True:
            temporary = _temporary(path)
            try:
                fd = create(temporary)
            except FileNotFoundError:
                if path.parent.is_dir():  # as below, before it was opened
                    continue
                raise
            fcntl.flock(fd, fcntl.LOCK_EX)
            if temporary.exists():  # else another process took it for a dead one's before it was locked
                return temporary, fd
            os.close(fd)


def _make_folder(temporary: Path) -> int:
    temporary.mkdir()
    return os.open(temporary, os.O_RDONLY)


def _swap(temporary: Path, path: Path) -> None:
    """Put the folder `temporary` in the place of the folder `path`.

    Two renames, so killed between them `path` is gone; `remove_stale` puts the old folder back. Where another writer
    puts its own there between them, that one is replaced too.
    """
    placed = False
    while not placed:
        old = _temporary(path, _PREVIOUS)
        has_old = _moved(path, old, errno.ENOENT)
        try:
            placed = _moved(temporary, path, *_THERE)
        except BaseException:
            if has_old:
                old.rename(path)
            raise
        if has_old:
            shutil.rmtree(old, ignore_errors=True)


def _moved(folder: Path, to: Path, *meanwhile: int) -> bool:
    """Rename a folder; False where that fails with one of these numbers, of what other writers do meanwhile."""
    try:
        folder.rename(to)
    except OSError as e:
        if e.errno not in meanwhile:
            raise
        return False
    return True


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, path)
        return
    try:  # a link refuses a target that came into being meanwhile; a rename would replace it
        os.link(temporary, path)
    except FileExistsError as e:
        raise OutputError(f"{path} was written by another process meanwhile; it was left alone") from e
    except OSError:  # a file system without hard links
        if path.exists():
            raise OutputError(f"{path} was written by another process meanwhile; it was left alone") from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def remove_stale(path: Path) -> None:
    """Remove what killed processes have left of a file or folder of that path; what a living one writes stays."""
    if not path.parent.is_dir():
        return
    for left in path.parent.iterdir():
        if not left.name.startswith(_head(path)) or left.is_symlink():
            continue
        if left.name.endswith(_PREVIOUS) and left.is_dir():
            if path.exists() or not _moved(left, path, errno.ENOENT, *_THERE):
                shutil.rmtree(left, ignore_errors=True)
        if not left.name.endswith(_MARK):
            continue
        try:
            fd = os.open(left, os.O_RDONLY)
        except OSError:
            continue  # finished or removed meanwhile
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # a living process is writing it
        finally:
            os.close(fd)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Disk full, quota, permissions: as an error of our tree that names the output."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}; nothing was left behind") from e


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
