"""Headers of checkpoints on the Hugging Face Hub without their tensors, to plan from: files of full size with gaps.

A safetensors or GGUF file has its header at the front; a torch zip has its directory at the end, and small records that
say what its tensors are.
"""

import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_lab.convert.hub import HubFile, refusals_in_words
from rwkv_lab.errors import HubError

_FRONT = 1 << 20  # bytes read of the front, and of the end
_GGUF_FRONT = 16 << 20  # its header holds the vocabulary
_SMALL = 8 << 20  # files, and records of a zip, that are read whole
_LOCAL_HEADER = 30  # bytes before the name of a record in a zip
_DATA = ".pth", ".safetensors", ".st", ".gguf", ".pt", ".bin"

Read = Callable[[int, int], bytes]  # (offset, bytes) -> what is there


class NoRangesError(HubError):
    """The server hands out whole files only, or the header is longer than any that is known."""


def headers_only(
    repo_id: str, commit: str, name: str, files: Sequence[HubFile], folder: Path, small: Callable[[HubFile], Path]
) -> Path:
    """Write what opening a checkpoint reads into a folder; what to open there.

    Args:
        name: what to open, as of `needed`.
        small: the path of a small file on this disk, which is downloaded.
    Raises:
        NoRangesError: it has to be downloaded.
        HubError: the Hub refuses.
    """
    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.bytes <= _FRONT or not file.name.endswith(_DATA):
            shutil.copyfile(small(file), path)
        else:
            with path.open("wb+") as out:
                out.truncate(file.bytes)
                _fill(out, file.bytes, _reader(repo_id, commit, file.name))
    return folder / name


def _reader(repo_id: str, commit: str, name: str) -> Read:
    """Reads ranges of a file on the Hub."""
    from huggingface_hub import constants, hf_hub_url, utils

    stream: Any = getattr(utils, "http_stream_backoff", None)
    if stream is None:  # before 1.0
        raise NoRangesError(f"{name} of {repo_id} cannot be read in part by this version of huggingface_hub.")
    url = hf_hub_url(repo_id, name, revision=commit, endpoint=constants.ENDPOINT)

    def read(offset: int, nbytes: int) -> bytes:
        data, status = b"", 0
        headers = utils.build_hf_headers(library_name="rwkv_lab") | {"Range": f"bytes={offset}-{offset + nbytes - 1}"}
        with refusals_in_words(repo_id, f"the header of {name}"):
            with stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
                utils.hf_raise_for_status(answer)
                status = answer.status_code
                if status == 206:
                    data = b"".join(answer.iter_bytes())
        if status != 206:
            raise NoRangesError(f"{name} of {repo_id} cannot be read in part.")
        return data

    return read


def _fill(out: BinaryIO, size: int, read: Read) -> None:
    """The parts of a file that opening it reads."""
    front = read(0, min(size, _FRONT))
    _put(out, 0, front)
    if front[:4] == b"GGUF":
        _put(out, 0, read(0, min(size, _GGUF_FRONT)))
    elif front[:4] == b"PK\x03\x04":
        _put(out, size - _FRONT, read(size - _FRONT, _FRONT))
        _fill_zip(out, size, read)
    elif (end := 8 + int.from_bytes(front[:8], "little")) > len(front):
        _put(out, 0, read(0, min(size, end, 100 * _FRONT)))


def _fill_zip(out: BinaryIO, size: int, read: Read) -> None:
    """The records of a torch zip that are no tensors, and for each tensor the header before its bytes."""
    try:
        with zipfile.ZipFile(out) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # opening it will say so
    for member in members:
        at, name = member.header_offset, member.filename.encode()
        if "/data/" not in member.filename and member.file_size <= _SMALL:
            nbytes = _LOCAL_HEADER + len(name) + 256 + member.file_size  # 64 bytes of alignment, and what else is extra
            if at + nbytes > _FRONT and at < size - _FRONT:
                _put(out, at, read(at, min(nbytes, size - at)))
        elif at + _LOCAL_HEADER > _FRONT and at < size - _FRONT:
            fixed = b"PK\x03\x04" + bytes(_LOCAL_HEADER - 8) + len(name).to_bytes(2, "little") + bytes(2)
            _put(out, at, fixed + name)


def _put(out: BinaryIO, offset: int, data: bytes) -> None:
    out.seek(offset)
    out.write(data)
