"""Checkpoints from the Hugging Face Hub: which files of a repository are needed, and their way into the Hub's cache.

Files come through huggingface_hub, which resumes what breaks off and keeps them in its cache; their SHA-256 is compared
with the Hub's after that.
"""

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.open import ADAPTERS, INDEXES, SINGLES
from rwkv_lab.checkpoint.shard_index import shards_of
from rwkv_lab.convert.hub import HubFile, hub_api, refusals_in_words, require_hub
from rwkv_lab.convert.hub_headers import NoRangesError, headers_only
from rwkv_lab.convert.left_beside import LICENCES
from rwkv_lab.convert.spec import ConvertSpec
from rwkv_lab.errors import (
    CorruptFileError,
    HubError,
    HubUnreachableError,
    LayoutError,
    OutputError,
    ParameterError,
    UnsafeFileError,
)
from rwkv_lab.machine import disk_free
from rwkv_lab.paths import missing_file
from rwkv_lab.progress import Progress, human_bytes
from rwkv_lab.tokenizer.chat_template import TEMPLATE_FILES

log = logging.getLogger(__name__)

_LARGEST_BESIDE = 1 << 20  # bytes of a licence
_WEIGHTS = (".pth", ".safetensors", ".st", ".gguf", ".pt", ".bin")  # what names of checkpoints end in


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    repo_id: str
    revision: str  # as it was asked for: a branch, a tag, a commit
    commit: str
    files: tuple[HubFile, ...]
    unreached: str = ""  # why the Hub was not reached; its files are those in the cache then

    def holds(self, name: str) -> bool:
        return any(file.name == name for file in self.files)


@dataclass(frozen=True)
class Download:
    """Files of a repository on this disk."""

    repo_id: str
    commit: str
    files: tuple[HubFile, ...]
    path: Path  # what to open: a file, or a folder
    fetched: int  # bytes that were not in the cache before
    unreached: str = ""
    left: int = 0  # bytes that are still to be downloaded: only headers were read

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it comes from, in words."""
        size = human_bytes(sum(file.bytes for file in self.files))
        came = f"{human_bytes(self.fetched)} were downloaded" if self.fetched else "from the cache of earlier downloads"
        if self.left:
            came = f"of which {human_bytes(self.left)} will be downloaded; only headers were read"
        note = f"The source is {self.repo_id} on the Hugging Face Hub, commit {self.commit[:12]}: {size}, {came}."
        if not self.unreached:
            return (note,)
        return (note, f"Whether there is a newer one is not known. {self.unreached.splitlines()[0]}")

    def record(self) -> dict[str, Any]:
        """For the provenance, JSON-ready."""
        files = [{"name": f.name, "bytes": f.bytes} | ({"sha256": f.sha256} if f.sha256 else {}) for f in self.files]
        return {"repo_id": self.repo_id, "commit": self.commit, "files": files}


@checked
def download(repo_id: str, file: str = "", revision: str = "") -> Download:
    """A checkpoint of the Hub on this disk, in the Hub's own cache.

    Args:
        repo_id: "owner/name" of a model repository.
        file: its path there, of a file or a folder; "" for the repository itself, or the only checkpoint in it.
        revision: a branch, a tag or a commit; "" for the main branch.
    Raises:
        ParameterError: there is no such repository, revision or file; names what is near.
        HubError: the Hub refuses, or cannot be reached and the cache has no copy.
        CorruptFileError: what came is not what the Hub states.
        LayoutError: a folder that lacks files.
        OutputError: it does not fit on the disk of the cache.
    """
    repository = find_repository(repo_id, revision)
    return fetch(repository, *needed(repository, file.strip("/")))


@contextmanager
def source_of(spec: ConvertSpec, headers: bool = False) -> Iterator[tuple[Path, Download | None]]:
    """(what a conversion opens, how it came from the Hub), for the time of the block.

    Args:
        headers: headers are enough: of what is not in the cache, nothing more is downloaded if the server allows it.
    Raises:
        RwkvLabError: as `download`.
    """
    if spec.source is not None:
        if not spec.source.parent.is_dir() and spec.source.parent.parent == Path.cwd():
            name = f"{spec.source.parent.name}/{spec.source.name}"
            where = f"A model on the Hugging Face Hub is given by repo_id={name!r} in place of source."
            raise ParameterError(f"{missing_file(spec.source)}.\n{where}")
        yield spec.source, None
        return
    repository = find_repository(spec.repo_id, spec.revision)
    name, files = needed(repository, spec.file.strip("/"))
    missing = [file for file in files if _cached(repository, file.name) is None]
    if headers and missing and not repository.unreached:
        with TemporaryDirectory(prefix="rwkv_lab") as folder:
            try:
                small, inside = partial(_small, repository), Path(folder) / repository.commit  # named as in the cache
                path = headers_only(repository.repo_id, repository.commit, name, files, inside, small)
            except NoRangesError:
                log.info("%s: it has to be downloaded to read its header", repository.repo_id)
            else:
                left = sum(file.bytes for file in missing)
                yield path, Download(repository.repo_id, repository.commit, tuple(files), path, 0, left=left)
                return
    found = fetch(repository, name, files)
    yield found.path, found


def _small(repository: Repository, file: HubFile) -> Path:
    return _fetch_file(repository, file, _cached(repository, file.name) is None)


def find_repository(repo_id: str, revision: str = "") -> Repository:
    """What a repository holds; where the Hub cannot be reached, what the cache has of it.

    Raises:
        ParameterError, HubError: as `download`.
    """
    require_hub(f"repo_id={repo_id!r}")
    try:
        with refusals_in_words(repo_id, f"the list of files of {repo_id}"):
            info = hub_api().model_info(repo_id, revision=revision or None, files_metadata=True)
            files = tuple(_hub_file(sibling) for sibling in info.siblings or ())
            return Repository(info.id, revision, str(info.sha), files)
    except HubUnreachableError as e:
        found = _in_cache(repo_id, revision, str(e))
        if found is None:
            raise
        log.warning("%s", e)
        return found


def _hub_file(sibling: Any) -> HubFile:
    path = PurePosixPath(sibling.rfilename)
    if path.is_absolute() or ".." in path.parts:
        raise UnsafeFileError(f"The Hub lists {sibling.rfilename!r}, outside its repository; nothing was written.")
    lfs = sibling.lfs
    return HubFile(sibling.rfilename, sibling.size or 0, lfs.sha256 if lfs else "")


def _in_cache(repo_id: str, revision: str, why: str) -> Repository | None:
    """The copy in the cache of huggingface_hub, whole or in part; None where there is none."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision or None, local_files_only=True))
    except errors.LocalEntryNotFoundError as e:
        part = getattr(e, "snapshot_path", None)  # of newer versions, where other files are missing
        if part is None:
            return None
        folder = Path(part)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = (HubFile(path.relative_to(folder).as_posix(), path.stat().st_size, _cached_sha256(path)) for path in paths)
    return Repository(repo_id, revision, folder.name, tuple(files), why)


def _cached_sha256(path: Path) -> str:
    """Of a large file in the cache, a link to what is named by its SHA-256."""
    name = path.readlink().name if path.is_symlink() else ""
    return name if len(name) == 64 else ""


def needed(repository: Repository, file: str) -> tuple[str, list[HubFile]]:
    """(what to open, "" for the repository's own folder; the files that it needs).

    Raises:
        ParameterError: there is nothing of that name, or several could be meant.
        LayoutError: a folder without a checkpoint.
    """
    if repository.holds(file):
        name = PurePosixPath(file)
        if name.name not in INDEXES:
            return file, [f for f in repository.files if f.name == file]
        file = "" if str(name.parent) == "." else str(name.parent)
    inside = f"{file}/" if file else ""
    if inside and not any(f.name.startswith(inside) for f in repository.files):
        raise ParameterError(_no_file(repository, file))
    there = {f.name.removeprefix(inside): f for f in repository.files if f.name.startswith(inside)}
    names = _of_folder(repository, inside, there)
    if names:
        return file, [there[name] for name in names]
    weights = [name for name in there if name.endswith(_WEIGHTS)]
    if len(weights) == 1:
        return inside + weights[0], [there[weights[0]]]
    where = f"{repository.repo_id}/{file}".rstrip("/")
    if not weights:
        raise LayoutError(f"{where} on the Hub holds no checkpoint: {_some(there) or 'nothing'}.")
    raise ParameterError(f"{where} on the Hub holds {len(weights)} checkpoints; say which by file=:\n{_some(weights)}")


def _of_folder(repository: Repository, inside: str, there: dict[str, HubFile]) -> list[str]:
    """The names in a folder that opening it takes; empty where it is no checkpoint as a whole."""
    adapter = "adapter_config.json" in there
    found = next((name for name in (ADAPTERS if adapter else (*INDEXES, *SINGLES)) if name in there), None)
    if found is None:
        return []
    beside = [name for name in there if LICENCES.fullmatch(name) and there[name].bytes < _LARGEST_BESIDE]
    small = ("config.json", "adapter_config.json", *TEMPLATE_FILES)
    names = [*(name for name in small if name in there), *beside, found]
    if found not in INDEXES:
        return names
    shards = list(dict.fromkeys(shards_of(fetch(repository, inside + found, [there[found]]).path).values()))
    missing = [shard for shard in shards if shard not in there]
    if missing:
        where = "in the cache" if repository.unreached else f"in {repository.repo_id}"
        raise LayoutError(f"{inside}{found} names shards that are not {where}: {', '.join(missing[:3])}.")
    return names + shards


def _no_file(repository: Repository, file: str) -> str:
    names = [f.name for f in repository.files]
    by_last = {PurePosixPath(name).name: name for name in names}
    near = [*get_close_matches(file, names, n=3), *(by_last[n] for n in get_close_matches(file, by_last, n=3))]
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else f"it has {_some(weights) or _some(names)}"
    if repository.unreached:
        return f"{repository.repo_id} has no {file} in the cache; {hint}\n{repository.unreached}"
    return f"{repository.repo_id} on the Hub has no {file}; {hint}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def fetch(repository: Repository, name: str, files: Sequence[HubFile]) -> Download:
    """Files of a repository, each in the cache and checked.

    Args:
        name: what to open, as of `needed`.
    Raises:
        HubError, CorruptFileError, OutputError: as `download`.
    """
    missing = [file for file in files if _cached(repository, file.name) is None]
    _check_disk(repository, missing)
    paths = [_fetch_file(repository, file, file in missing) for file in files]
    folder = paths[0].parents[len(PurePosixPath(files[0].name).parts) - 1]
    if repository.unreached:
        files = [replace(f, bytes=path.stat().st_size) for f, path in zip(files, paths, strict=True)]
    fetched = sum(file.bytes for file in missing)
    return Download(repository.repo_id, repository.commit, tuple(files), folder / name, fetched, repository.unreached)


def _cached(repository: Repository, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.repo_id, name, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None


def _check_disk(repository: Repository, missing: Sequence[HubFile]) -> None:
    from huggingface_hub import constants

    if not missing:
        return
    size, cache = sum(file.bytes for file in missing), Path(constants.HF_HUB_CACHE).expanduser()
    free = disk_free(next(folder for folder in (cache, *cache.parents) if folder.is_dir()))
    if size > free:
        raise OutputError(
            f"{repository.repo_id}: {human_bytes(size)} are to be downloaded, {human_bytes(free)} are free on the disk "
            f"of {cache}.\nHF_HOME names another folder for the Hub's cache."
        )
    log.info("%s: downloading %s in %d files", repository.repo_id, human_bytes(size), len(missing))


def _fetch_file(repository: Repository, file: HubFile, new: bool) -> Path:
    doing = f"the download of {file.name}"
    with refusals_in_words(repository.repo_id, doing):
        path = Path(
            hub_api().hf_hub_download(
                repository.repo_id,
                file.name,
                revision=repository.revision or None,  # by its name, so that the cache knows what it stood for
                local_files_only=bool(repository.unreached),
                **_progress(file),
            )
        )
    if path.parents[len(PurePosixPath(file.name).parts) - 1].name != repository.commit:
        raise HubError(f"{repository.repo_id} was changed on the Hub while it was downloaded. Run it again.")
    if new and file.sha256 and _sha256(path) != file.sha256:
        blob = path.resolve()
        path.unlink()  # or the cache would hand out the damaged file again
        blob.unlink(missing_ok=True)
        raise CorruptFileError(
            f"{file.name} of {repository.repo_id} has another SHA-256 than the Hub states ({file.sha256[:12]}…).\n"
            "It was damaged on its way and has been removed from the cache; run it again."
        )
    return path


def _progress(file: HubFile) -> dict[str, Any]:
    """The argument by which a download is shown as other work here is. The bar of huggingface_hub may show the address
    that a file comes from, which may be signed."""
    from huggingface_hub.utils import tqdm

    if "tqdm_class" not in inspect.signature(hub_api().hf_hub_download).parameters:  # before 1.0
        return {}

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"disable": True})
            self.shown = Progress(PurePosixPath(file.name).name, file.bytes)

        def update(self, n: float | None = 1) -> bool | None:
            self.shown.advance(int(n or 0))
            return super().update(n)

        def close(self) -> None:
            super().close()
            if hasattr(self, "shown"):
                self.shown.__exit__()

    return {"tqdm_class": Bar}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
