"""Checkpoints in a folder of trainings: which there are, which is the latest, whether it is whole.

Known are `checkpoint-N` folders of transformers' Trainer, `rwkv-N.pth` and `rwkv-final.pth` of RWKV-LM and RWKV-PEFT,
and what rwkv_lab.train writes, which states its steps. Files whose names differ in the number alone are one series. The
latest checkpoint is the one with the most steps in the series that was written to last.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, file_facts, open_checkpoint
from rwkv_lab.checkpoint.provenance import provenance_of
from rwkv_lab.errors import CheckpointValidationError, RwkvLabError
from rwkv_lab.export.causal_lm.folder import architecture
from rwkv_lab.paths import missing_file, to_path
from rwkv_lab.progress import Progress
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.train.finished import NOTE
from rwkv_lab.train.resume import resume_path

_NUMBERED = re.compile(r"(?P<series>checkpoint|rwkv|epoch|step)[-_](?P<step>\d{1,12}|final)(?:\.(?:pth|safetensors))?")
_SUFFIXES = (".pth", ".safetensors", ".pt", ".bin", ".ckpt", ".gguf")
_UNFINISHED = (".tmp", ".part", ".partial", ".incomplete", ".crdownload", ".download")
_RESUME = resume_path(Path("x")).name.removeprefix("x")
_TRAINER_STATE = "trainer_state.json"  # what Trainer writes into a checkpoint after its tensors
_EXPORTED = ("model", "state", "lora", "pissa", "miss", "unmerged", "partial")  # kinds that can be exported


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that was found, from its headers.

    fault: why it is not taken, in words; "" where it can be.
    passed_over: of the one that was chosen: those that would have come first, and why they were not taken.
    """

    path: Path
    step: int | None  # None where neither name nor file tells
    modified: float  # seconds since 1970
    bytes: int
    kind: str
    fault: str = ""
    passed_over: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is chosen by."""
        return self.path.name


class CheckpointDetector:
    """Finds checkpoints.

    Args:
        path: a folder with checkpoints in it, or a checkpoint itself.

    Raises:
        CheckpointValidationError: there is nothing of that name.
    """

    @checked
    def __init__(self, path: str | Path):
        self.path = to_path(path, "checkpoint_path")
        if not self.path.exists():
            raise CheckpointValidationError(str(missing_file(self.path)))

    def list_available_checkpoints(self) -> list[CheckpointInfo]:
        """All that there are, the latest first; those that cannot be taken, with the reason, among them.

        Raises:
            CheckpointValidationError: the folder cannot be read.
        """
        if not self.path.is_dir():
            return [_look_at(self.path)]
        try:
            entries = sorted(self.path.iterdir())
            inside = [entry for entry in entries if _is_candidate(entry)]
        except OSError as e:
            raise CheckpointValidationError(f"{self.path} cannot be read: {e.strerror or e}") from e
        own = _look_at(self.path) if _holds_a_checkpoint(entries) else None
        if own is not None:  # its files are parts of it; what is numbered beside them is not
            inside = [entry for entry in inside if entry.is_dir()]
        found = [_look_at(entry) for entry in inside] + ([own] if own else [])
        newest: dict[str, float] = {}
        for one in found:
            newest[_series(one)] = max(one.modified, newest.get(_series(one), 0.0))
        return sorted(found, key=lambda one: _order(one, newest[_series(one)]), reverse=True)

    @checked
    def detect_latest_checkpoint(self, name: str = "") -> CheckpointInfo:
        """The latest that is whole, read and checked; or the one that is called `name`.

        Raises:
            CheckpointValidationError: there is none, or none of that name, or it is damaged or still being written.
        """
        found = self.list_available_checkpoints()
        if name or self.path.is_file():
            return self._named(name or self.path.name, found)
        passed = []
        for one in found:
            if not (fault := one.fault or self._damage(one.path)):
                return replace(one, passed_over=tuple(passed))
            passed.append(f"{one.name} was not taken: {fault}")
        why = f": {passed[0]}" if passed else "."
        raise CheckpointValidationError(f"{self.path} has no checkpoint that can be exported{why}")

    def _named(self, name: str, found: list[CheckpointInfo]) -> CheckpointInfo:
        names = [one.name for one in found]
        if name not in names:
            near = did_you_mean(name, names) or "."
            raise CheckpointValidationError(
                f"{self.path} has no checkpoint {name!r}{near}\nThere are: {', '.join(names[:8]) or 'none'}"
            )
        one = found[names.index(name)]
        if one.fault:
            raise CheckpointValidationError(f"{one.path} cannot be exported: {one.fault}")
        self.validate_checkpoint_integrity(one.path)
        return one

    def _damage(self, path: Path) -> str:
        try:
            self.validate_checkpoint_integrity(path)
        except CheckpointValidationError as e:
            return str(e).splitlines()[0]
        return ""

    @checked
    def validate_checkpoint_integrity(self, path: str | Path) -> None:
        """Read all of a checkpoint: every tensor is there in full, and has the checksum that was saved with it.

        Raises:
            CheckpointValidationError: names the file and the tensor.
        """

        def read_all(ck: Checkpoint) -> None:
            with Progress(f"checking {ck.path.name}", ck.bytes) as progress:
                for info in ck.stored.values():
                    for _ in info.blocks():
                        pass
                    progress.advance(info.span)

        _opened(Path(path), read_all)

    @checked
    def get_checkpoint_metadata(self, path: str | Path) -> dict[str, Any]:
        """What a checkpoint says of itself, from its headers: kind, layout, step, tensors, dtypes, size, fingerprint,
        what made it.

        Raises:
            CheckpointValidationError: it cannot be opened.
        """
        return _opened(Path(path), _metadata)


def _metadata(ck: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(ck.path),
        "kind": ck.kind,
        "layout": None if ck.layout is None else str(ck.layout),
        "reason": ck.reason,
        "step": _step(ck.path, ck),
        "tensors": len(ck),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in ck.info.values())),
        "bytes": ck.bytes,
        "fingerprint": file_facts(ck).fingerprint,
        "training": _training(ck),
        "provenance": provenance_of(ck),
    }


def _opened(path: Path, use: Callable[[Checkpoint], Any]) -> Any:
    try:
        with open_checkpoint(path) as ck:
            return use(ck)
    except RwkvLabError as e:
        raise CheckpointValidationError(str(e)) from e
    except OSError as e:
        raise CheckpointValidationError(f"{path} cannot be read: {e.strerror or e}") from e


def _is_candidate(entry: Path) -> bool:
    """Whether a file or folder looks like a checkpoint, whole or not; hidden ones are temporaries."""
    if entry.name.startswith(".") or entry.name.endswith((_RESUME, ".json")):
        return False
    if entry.is_dir():
        return entry.name.startswith("tmp-checkpoint") or _holds_a_checkpoint(list(entry.iterdir()))
    stem = entry.name
    for suffix in _UNFINISHED:
        stem = stem.removesuffix(suffix)
    return stem.endswith(_SUFFIXES) and not _is_part(entry)


def _is_part(entry: Path) -> bool:
    """Of a training: what is no checkpoint of a model, such as an optimiser's state."""
    return entry.stem in ("optimizer", "scheduler", "training_args", "scaler") or entry.name.startswith("rng_state")


def _holds_a_checkpoint(entries: list[Path]) -> bool:
    """Whether these are the files of a checkpoint in a folder."""
    starts = ("model", "pytorch_model", "adapter_model")
    return any(entry.name.startswith(starts) and ".safetensors" in entry.name or
               entry.name.startswith(starts) and ".bin" in entry.name for entry in entries)  # fmt: skip


def _look_at(path: Path) -> CheckpointInfo:
    """What its name and headers tell."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    modified = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    size = sum(file.stat().st_size for file in files)
    blank = CheckpointInfo(path, _step(path, None), modified, size, "unknown")
    if fault := _being_written(path):
        return replace(blank, fault=fault)
    try:
        with open_checkpoint(path) as ck:
            other = ck.format == "folder" and ck.layout is None and architecture(ck.config) is not None
            found = replace(blank, kind="model" if other else ck.kind, step=_step(path, ck))
            reason = "" if ck.adapter_config is not None else ck.reason
            wrong = "" if found.kind in _EXPORTED else reason or f"it is of kind {ck.kind}, which is not exported"
            return replace(found, fault=wrong)
    except RwkvLabError as e:
        return replace(blank, fault=f"it is damaged, or still being written: {str(e).splitlines()[0]}")


def _being_written(path: Path) -> str:
    """What tells that the training or the copy has not ended, "" if nothing does."""
    if path.name.endswith(_UNFINISHED) or path.name.startswith("tmp-checkpoint"):
        return "it is still being written: its name is that of a temporary"
    if path.is_file() and resume_path(path).exists():
        return f"its training has not ended: {resume_path(path).name} lies beside it"
    if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) and not (path / _TRAINER_STATE).exists():
        return f"it is still being written: it has no {_TRAINER_STATE}, which comes last"
    return ""


def _training(ck: Checkpoint) -> dict[str, Any] | None:
    """The settings that rwkv_lab trained it by, where it did."""
    try:
        settings = json.loads(ck.metadata[NOTE])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _step(path: Path, ck: Checkpoint | None) -> int | None:
    """The number in its name, or the steps that its training notes in it."""
    if (found := _NUMBERED.fullmatch(path.name)) and found["step"] != "final":
        return int(found["step"])
    settings = (_training(ck) if ck else None) or {}
    steps = settings.get("steps_done", settings.get("steps"))
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def _series(one: CheckpointInfo) -> str:
    found = _NUMBERED.fullmatch(one.name)
    return found["series"] if found else f"{one.name}/"


def _order(one: CheckpointInfo, series_modified: float) -> tuple[float, str, float, float]:
    found = _NUMBERED.fullmatch(one.name)
    final = found is not None and found["step"] == "final"
    step = math.inf if final else -1 if one.step is None else one.step
    return series_modified, _series(one), step, one.modified
