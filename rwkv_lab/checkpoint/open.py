"""Opens any checkpoint lazily: headers now, a tensor when it is read. A file's kind is decided by its bytes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import rwkv_lab.checkpoint.formats  # noqa: F401  # makes the formats known
from rwkv_lab.arguments import shown_value
from rwkv_lab.checkpoint.adapter_names import adapter_format, our_targets, present_adapter
from rwkv_lab.checkpoint.foreign_format import FORMAT_NOTE, RESCALED, Facts, ForeignFormat, present
from rwkv_lab.checkpoint.format import FORMATS, format_of, no_checkpoint
from rwkv_lab.checkpoint.json_files import read_json
from rwkv_lab.checkpoint.kind import Identity, identify
from rwkv_lab.checkpoint.layout import Layout
from rwkv_lab.checkpoint.packed import shown, unpacked
from rwkv_lab.checkpoint.prefixes import bare_names, note_on_prefixes, removed_prefixes
from rwkv_lab.checkpoint.rescaled import looks_rescaled
from rwkv_lab.checkpoint.shard_index import shards_of
from rwkv_lab.checkpoint.source import SourceFile, TensorInfo
from rwkv_lab.checkpoint.stated import contradictions
from rwkv_lab.checkpoint.unmerged import Unmerged, split_unmerged
from rwkv_lab.checkpoint.unusable import split_folder
from rwkv_lab.errors import CorruptFileError, LayoutError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.paths import missing_file, to_path
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.text import counted

log = logging.getLogger(__name__)

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")  # what names of shards end in
# Files of a folder that hold tensors or say which do; the first that is there counts.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


class Checkpoint:
    """Tensors by name in one file or folder. Use as a context manager; `open_checkpoint` makes it.

    `ck[name]` reads one tensor now; everything else comes from the headers alone.
    """

    def __init__(self, path: Path):
        self.path = path
        self.format = ""  # "pth", "safetensors", "folder" or "adapter"
        self.files: list[SourceFile] = []
        self.stored: dict[str, TensorInfo] = {}  # in file order, under the names in the file
        self.info: dict[str, TensorInfo] = {}  # the same under their names in a model, without prefixes of wrappers
        self.prefixes: dict[str, int] = {}  # what was taken off the names, and off how many
        self.part = ""  # what `info` was narrowed down to: "frozen" or "adapter …", of kind "unmerged"
        self.others: dict[str, object] = {}  # entries of a .pth that are no tensors
        self.metadata: dict[str, str] = {}  # of a .safetensors, and what rwkv_lab wrote beside the tensors of a .pth
        self.adapter_config: dict | None = None  # of an adapter folder
        self.config: dict = {}  # config.json of a folder
        self.foreign_format: ForeignFormat | None = (
            None  # whose names its tensors have in the file; `info` has BlinkDL's
        )
        self.names_in_file: dict[str, str] = {}  # name in `info` -> name in the file, where the two may differ
        self.inverses: dict[
            str, Callable[[torch.Tensor], torch.Tensor]
        ] = {}  # name in `info` -> from the one in the file
        self.notes: list[str] = []  # what was found out about it that a reader should know, in words
        self.ignored: dict[str, str] = {}  # name in the file of what a foreign format has and no model needs -> why

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, dense and row-major, read now.

        Raises:
            LayoutError: none of that name.
        """
        if not isinstance(name, str) or name not in self.info:
            near = did_you_mean(name, self.info) if isinstance(name, str) else ""
            raise LayoutError(f"{self.path} holds no tensor {shown_value(name)}{near}.")
        return self.info[name].read()

    def __contains__(self, name: str) -> bool:
        return name in self.info

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files:
            file.close()

    @property
    def closed(self) -> bool:
        return all(file.closed for file in self.files)

    def reopen(self) -> None:
        """Open the files again after `close`; what is known of them from their headers stays as it is, so ask
        `unchanged.refuse_changed` and `refuse_changed_header` whether it still holds.

        Raises:
            CorruptFileError: a file cannot be opened any more.
        """
        for file in self.files:
            file.reopen()

    def keep_frozen(self) -> None:
        """Of kind "unmerged": go on with the frozen model alone, under its own names."""
        self._keep("frozen", self._unmerged().frozen)

    def keep_adapter(self, name: str | None = None) -> None:
        """Of kind "unmerged": go on with an adapter alone, under the names that a file of its own would have.

        Args:
            name: of the adapter; None for the only one.
        Raises:
            ParameterError: there are several, or none of that name.
        """
        parts = self._unmerged().adapter(name, str(self.path))
        self._keep("adapter" if name is None else f"adapter {name}", parts)

    def _unmerged(self) -> Unmerged:
        parts = split_unmerged(self.info)
        if parts is None:
            raise LayoutError(f"{self.path} has no frozen part and adapters to tell apart: it is of kind {self.kind}.")
        return parts

    def _keep(self, part: str, names: dict[str, str]) -> None:
        self.part, self.info = part, {name: self.info[here] for name, here in names.items()}
        self.__dict__.pop("identity", None)

    @property
    def bytes(self) -> int:
        """Size of the file, or of the files of a folder that hold tensors."""
        return sum(f.size for f in self.files)

    @cached_property
    def identity(self) -> Identity:
        shapes = {n: t.shape for n, t in self.info.items()}
        found = identify(shapes, self.others, self.adapter_config, self.metadata)
        return replace(found, prefix=" and ".join(self.prefixes))

    @property
    def kind(self) -> str:
        """ "model", "unmerged" (a model and its adapter side by side), "partial", "state", "lora", "pissa",
        "pissa-init", "miss", "converted", "unsupported", "unusable" (packed, split or no model) or "unknown"."""
        return self.identity.kind

    @property
    def layout(self) -> Layout | None:
        """Generation and dimensions; None where this is not a model; `reason` then states why."""
        return self.identity.layout

    @property
    def quantised(self) -> Counter[str]:
        """How many tensors are quantised in the file, by type ("Q8_0", "int8"); they are read as float32."""
        return Counter(shown(t.derived.quantised) for t in self.stored.values() if t.derived and t.derived.quantised)

    @property
    def group_norm_eps(self) -> float | None:
        """Of `att.ln_x`, where a configuration states it."""
        if self.foreign_format is None or self.layout is None:
            return None
        return self.foreign_format.group_norm_eps(
            Facts(self.config, self.metadata, str(self.path)), self.layout.head_size
        )

    @property
    def reason(self) -> str:
        """Why this is no whole model, "" where it is one."""
        shard = _SHARD.search(self.path.name) if self.identity.reason else None
        hint = f"; it is shard {int(shard[1])} of {int(shard[2])}: give the folder that it lies in" if shard else ""
        return self.identity.reason + hint

    @property
    def evidence(self) -> tuple[str, ...]:
        return self.identity.evidence


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a torch zip `.pth`, a `.safetensors`, a `.gguf`, a Hugging Face folder (one file, or shards with their
    index) or an adapter folder. Tensors of a foreign format (`rwkv_lab.checkpoint.formats`) come under BlinkDL's names.

    Only headers are read. No pickle is ever run. Prefixes of wrappers (`module.`, `_orig_mod.`, …) are taken off the
    names; `prefixes` has them.

    Raises:
        CorruptFileError: truncated, or not a checkpoint.
        UnsafeFileError: a pickle that would run code, or an index that leads out of its folder.
        LayoutError: a folder without a checkpoint, an index that disagrees with its shards, or two names that are the
            same without prefixes.
        ParameterError: no path, or nothing there; names what is near.
    """
    path = to_path(path, "checkpoint")
    ck = Checkpoint(path)
    try:
        if path.is_dir():
            _open_folder(ck, path)
        else:
            _open_file(ck, path)
        _name_tensors(ck)
        _present(ck)
    except OSError as e:  # a name that is too long, a folder that may not be listed, a disk that fails
        ck.close()
        raise CorruptFileError(f"cannot read {path}: {e.strerror or e}") from e
    except BaseException:
        ck.close()
        raise
    return ck


def _present(ck: Checkpoint) -> None:
    """Give the tensors of a foreign format BlinkDL's names."""
    known = adapter_format(ck.info)
    if known is not None:
        ck.foreign_format = known
        ck.info, ck.names_in_file = present_adapter(known, ck.info)
        if ck.adapter_config is not None:
            targets = our_targets(known, ck.adapter_config.get("target_modules"))
            ck.adapter_config = ck.adapter_config | {"target_modules": targets}
        return
    facts = Facts(ck.config, ck.metadata, str(ck.path))
    found = present(ck.info, facts)
    every = ck.config.get("rescale_every")
    if found is not None and found.format.rescales and facts.rescaled is None and isinstance(every, int) and every > 0:
        if looks_rescaled(found.tensors, every):
            found = present(ck.info, replace(facts, config=ck.config | {RESCALED: every}))
            _note(
                ck,
                f"att.output and ffn.value lie halved after every {every} layers, as transformers' class leaves them "
                "in evaluation; they are read as they were before.",
            )
    ours = any(key.startswith("rwkv_lab") for key in ck.metadata)
    if found is None and ck.format == "safetensors" and ck.kind == "state" and not ours:
        _note(
            ck,
            "A tuned state in a .safetensors does not tell which of its dimensions is which: it is read as [H, V, K], "
            "as trainers save it. Files for web-rwkv and ai00 hold [H, K, V].",
        )
    noted = str(ck.metadata.get(FORMAT_NOTE, ""))
    if noted and (found is None or found.format.name != noted):
        _note(ck, f"Its metadata states the format {noted[:40]!r}; its tensors have other names, and are read by them.")
    if found is not None:
        ck.foreign_format, ck.info, ck.ignored = found.format, found.tensors, found.ignored
        ck.names_in_file, ck.inverses = found.theirs, found.inverses
        _tie(ck)
        if ck.layout is not None:
            for note in contradictions(found.format, ck.layout, ck.config, ck.metadata, found.tensors):
                _note(ck, note)


def _tie(ck: Checkpoint) -> None:
    """Give a model whose configuration ties them the head that its embedding is."""
    if ck.config.get("tie_word_embeddings") is not True or "emb.weight" not in ck.info:
        return
    if "head.weight" in ck.info:
        _note(
            ck,
            f"config.json states tie_word_embeddings, and there is a head of its own, "
            f"{ck.names_in_file['head.weight']}: it is read, where programs that tie take the embedding for it.",
        )
    else:
        ck.info["head.weight"] = replace(ck.info["emb.weight"], name="head.weight")
        ck.names_in_file["head.weight"] = ck.names_in_file["emb.weight"]
        ck.inverses["head.weight"] = ck.inverses["emb.weight"]


def _note(ck: Checkpoint, note: str) -> None:
    ck.notes.append(note)
    log.warning("%s: %s", ck.path, note)


def _open_file(ck: Checkpoint, path: Path) -> None:
    """Add the tensors of one file to `ck`."""
    if not path.exists():
        raise missing_file(path)
    if not path.is_file():
        raise CorruptFileError(f"{path} is neither a file nor a folder")
    if path.suffix == ".distcp" and (path.parent / ".metadata").is_file():
        raise LayoutError(split_folder(path.parent))
    file = SourceFile(path)
    ck.files.append(file)
    head = file.read(0, min(file.size, 512))
    known = format_of(head, file.size)
    if known is None:
        raise no_checkpoint(path, head, file.size)
    if path.suffix not in known.suffixes:
        log.info("%s holds %s, whatever its name says", path, known.described)
    header = known.read(file)
    ck.format = ck.format or known.name
    ck.others |= header.others
    ck.metadata |= header.metadata
    tensors = unpacked(header.tensors, header.metadata)
    twice = next((n for n in tensors if n in ck.stored), None)
    if twice:
        raise LayoutError(
            f"{path}: {twice} is in {ck.stored[twice].file.path.name} too; a tensor may be in one file only"
        )
    ck.stored |= tensors


def _name_tensors(ck: Checkpoint) -> None:
    """Fill `ck.info`."""
    bare = bare_names(ck.stored, str(ck.path))
    ck.info = {bare[name]: info for name, info in ck.stored.items()}
    ck.prefixes = removed_prefixes(bare)
    if note := note_on_prefixes(ck.prefixes):
        _note(ck, note)


def _open_folder(ck: Checkpoint, folder: Path) -> None:
    ck.format = "folder"
    names = ADAPTERS if (folder / "adapter_config.json").is_file() else (*INDEXES, *SINGLES)
    if names is ADAPTERS:
        ck.format, ck.adapter_config = "adapter", read_json(folder / "adapter_config.json")
    found = next((folder / n for n in names if (folder / n).is_file()), None)
    if found is None:
        model = next((n for n in (*INDEXES, *SINGLES) if (folder / n).is_file()), None)
        if model:
            raise LayoutError(
                f"{folder} has adapter_config.json, so it is an adapter's folder; of {' and '.join(ADAPTERS)} there is "
                f"none.\nCopy the adapter there, or take adapter_config.json out to read the model in {model}."
            )
        weights = next((n for n in ADAPTERS if (folder / n).is_file()), None)
        if weights and names is not ADAPTERS:
            raise LayoutError(
                f"{folder} has {weights} and no adapter_config.json, which states its kind. Save or copy it again."
            )
        if advice := split_folder(folder):
            raise LayoutError(advice)
        there = sorted(p.name for p in folder.iterdir())
        if shard := next((name for name in there if _SHARD.search(name)), None):
            raise LayoutError(f"{folder} has shards ({shard}) and no index of them, {INDEXES[0]}; download it too.")
        advice = _files_in(folder, there)
        there = there[:8]
        raise LayoutError(
            f"{folder} holds none of {', '.join(names)}.\nIt holds: {', '.join(there) or 'nothing'}{advice}"
        )
    if (folder / "config.json").is_file():
        ck.config = read_json(folder / "config.json")
    if found.name in INDEXES:
        _open_shards(ck, folder, found)
    else:
        _open_file(ck, found)


def _files_in(folder: Path, names: Sequence[str]) -> str:
    """The advice to give one of the checkpoints in a folder by itself; "" where none is there."""
    suffixes = {suffix for known in FORMATS.values() for suffix in known.suffixes}
    found = next((name for name in names if Path(name).suffix in suffixes), None)
    return f"\nGive the file by itself: {folder / found}" if found else ""


def _open_shards(ck: Checkpoint, folder: Path, index: Path) -> None:
    weight_map = shards_of(index)
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise LayoutError(f"{index} names the shard {shard}, which is not there; download it too")
    others = sorted(p.name for p in folder.iterdir() if p.suffix == Path(shards[0]).suffix) if shards else []
    left = [name for name in others if name not in shards and name not in ADAPTERS]
    if left:
        _note(
            ck,
            f"{index.name} does not name {', '.join(left[:3])}, beside its {counted(len(shards), 'shard')}: not read.",
        )
    for shard in shards:
        _open_file(ck, folder / shard)
    for name, shard in weight_map.items():
        if name not in ck.stored or ck.stored[name].file.path != folder / shard:
            raise LayoutError(f"{index} lists {name} in {shard}; it is not there")
    unlisted = [n for n in ck.stored if n not in weight_map]
    if unlisted:
        raise LayoutError(f"{index} does not list {unlisted[0]}, which is in {ck.stored[unlisted[0]].file.path.name}")
