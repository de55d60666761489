"""Reads the header of a torch checkpoint: a zip of stored records, one of them a pickle that describes the others."""

import io
import struct
import zipfile
from dataclasses import dataclass

from isal.isal_zlib import crc32

from rwkv_lab.checkpoint.source import ITEM_BYTES, SourceFile, TensorInfo, dense_stride, is_name
from rwkv_lab.checkpoint.torch_pickle import PickledTensor, read_tensor_pickle
from rwkv_lab.errors import CorruptFileError, UnsafeFileError

_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")  # 30 bytes: signature, …, length of name, length of extra
_MAX_PICKLE = 100_000_000  # bytes; a model of 1,000 tensors has 0.1 MB
_MAX_NOTE = 1_000_000  # bytes of a text that travels with the tensors
_NOTES = "rwkv_lab"  # what the names of our own texts begin with
_MAX_DIRECTORY = 16_000_000  # bytes of the zip's list of its records; the same model has 0.1 MB


@dataclass(frozen=True)
class Record:
    """A stored member of the zip."""

    offset: int  # of its data in the file
    nbytes: int
    crc32: int | None  # None where the writer left the checksums out (torch's set_crc32_options(False))


def read_torch_zip(file: SourceFile) -> tuple[dict[str, TensorInfo], dict[str, object], dict[str, str]]:
    """(tensors by name in file order, what else is in the dict, texts that rwkv_lab wrote beside it).

    Raises:
        CorruptFileError: truncated, compressed, overlapping, or sizes that do not agree.
        UnsafeFileError: records that lead outside the archive, or a pickle that wants more than tensors.
    """
    records = _records(file)
    folder, pickle = _find_pickle(records, file)
    if pickle.nbytes > _MAX_PICKLE:
        raise CorruptFileError(f"{file.path}: its pickle has {pickle.nbytes} bytes; {_MAX_PICKLE} are the limit")
    order = records.get(f"{folder}/byteorder")
    if order and file.read(order.offset, order.nbytes) != b"little":
        raise CorruptFileError(f"{file.path} was written on a big-endian machine; save it again on a little-endian one")
    data = file.read(pickle.offset, pickle.nbytes)
    if pickle.crc32 is not None and crc32(data) != pickle.crc32:
        raise CorruptFileError(
            f"{file.path}: the list of its tensors (data.pkl) does not have the checksum that was saved with it.\n"
            "It was damaged after it was saved; download or copy it again."
        )
    entries = read_tensor_pickle(data, str(file.path))
    tensors: dict[str, TensorInfo] = {}
    others: dict[str, object] = {}
    for name, value in entries.items():
        if not is_name(name):
            raise CorruptFileError(f"{file.path}: the key {name!r} is not a name")
        if isinstance(value, PickledTensor):
            tensors[name] = _tensor_info(name, value, records.get(f"{folder}/data/{value.key}"), file)
        else:
            others[name] = value
    return tensors, others, _notes(records, folder, file)


def _notes(records: dict[str, Record], folder: str, file: SourceFile) -> dict[str, str]:
    notes = {}
    for name, record in records.items():
        note = name.removeprefix(f"{folder}/")
        if note == name or not note.startswith(_NOTES) or record.nbytes > _MAX_NOTE:
            continue
        try:
            notes[note] = file.read(record.offset, record.nbytes).decode()
        except UnicodeDecodeError as e:
            raise CorruptFileError(f"{file.path}: its record {note} is no text; the file was damaged") from e
    return notes


def _tensor_info(name: str, t: PickledTensor, record: Record | None, file: SourceFile) -> TensorInfo:
    if record is None:
        raise CorruptFileError(f"{file.path}: the data of {name} (record {t.key}) is not in the file")
    itemsize = ITEM_BYTES[t.dtype]
    if t.storage_numel * itemsize != record.nbytes:
        raise CorruptFileError(
            f"{file.path}: {name} claims {t.storage_numel} values of torch.{t.dtype}, "
            f"its record has {record.nbytes} bytes"
        )
    whole = TensorInfo(name, t.shape, t.dtype, file, 0, None if dense_stride(t.shape, t.stride) else t.stride)
    if whole.nbytes >= 1 << 63:
        raise CorruptFileError(f"{file.path}: {name} of shape {list(t.shape)} is larger than any tensor can be")
    if whole.numel and t.storage_offset * itemsize + whole.span > record.nbytes:
        raise CorruptFileError(
            f"{file.path}: {name} of shape {list(t.shape)} reaches beyond its record of {record.nbytes} bytes"
        )
    entire = t.storage_offset == 0 and whole.span == record.nbytes
    return TensorInfo(
        name,
        t.shape,
        t.dtype,
        file,
        offset=record.offset + t.storage_offset * itemsize,
        stride=whole.stride,
        crc32=record.crc32 if entire else None,
        storage=(record.offset, record.nbytes),
    )


class _Frugal(io.FileIO):
    """Refuses to read what a directory claims to be, where that is absurd."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise ValueError(f"it claims to have {size} bytes, {_MAX_DIRECTORY} are the limit")
        return super().read(size)


def _records(file: SourceFile) -> dict[str, Record]:
    try:
        with _Frugal(file.fd, "rb", closefd=False) as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        raise CorruptFileError(
            f"{file.path} starts like a torch checkpoint but its zip directory cannot be read ({e}).\n"
            f"The file looks truncated: it has {file.size} bytes. Download or copy it again."
        ) from e
    # torch can be told to leave checksums out; it then writes 0 for every record, among them ones that cannot have 0.
    checksummed = any(m.CRC for m in members)
    records: dict[str, Record] = {}
    end = 0
    for m in sorted(members, key=lambda m: m.header_offset):
        if m.filename in records:
            raise CorruptFileError(f"{file.path}: the record {m.filename} appears twice in it")
        if m.filename.startswith("/") or "\\" in m.filename or ".." in m.filename.split("/"):
            raise UnsafeFileError(f"{file.path}: the record {m.filename!r} leads outside the archive")
        if m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size or m.flag_bits & 1:
            raise CorruptFileError(
                f"{file.path}: the record {m.filename} is compressed or encrypted; torch never does that"
            )
        if m.header_offset < end or m.header_offset + _LOCAL_HEADER.size > file.size:
            raise CorruptFileError(f"{file.path}: the record {m.filename} overlaps another or lies beyond the end")
        header = _LOCAL_HEADER.unpack(file.read(m.header_offset, _LOCAL_HEADER.size))
        if header[0] != b"PK\x03\x04":
            raise CorruptFileError(f"{file.path}: the record {m.filename} is not where the zip directory says")
        offset = m.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        end = offset + m.file_size
        if end > file.size:
            raise CorruptFileError(f"{file.path}: {m.filename} needs {end} bytes, the file has {file.size}: truncated")
        records[m.filename] = Record(offset, m.file_size, m.CRC if checksummed else None)
    return records


def _find_pickle(records: dict[str, Record], file: SourceFile) -> tuple[str, Record]:
    found = [
        (n.removesuffix("/data.pkl"), r) for n, r in records.items() if n.count("/") == 1 and n.endswith("/data.pkl")
    ]
    if len(found) != 1:
        raise CorruptFileError(f"{file.path} is a zip, but not one that torch.save wrote ({len(found)} data.pkl in it)")
    folder = found[0][0]
    if f"{folder}/constants.pkl" in records or any(n.startswith(f"{folder}/code/") for n in records):
        raise UnsafeFileError(f"{file.path} is a TorchScript archive: it holds code. Save model.state_dict() instead.")
    return found[0]
