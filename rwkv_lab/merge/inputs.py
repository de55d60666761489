"""The files that go into a merge, each with its role: opened for planning, closed, and opened again for writing."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os.path import samefile
from pathlib import Path
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import Checkpoint, FileFacts, file_facts, open_checkpoint
from rwkv_lab.checkpoint.provenance import downloaded
from rwkv_lab.checkpoint.unchanged import FileState, file_states, refuse_changed, refuse_changed_header
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge.spec import SVD, MergeSpec
from rwkv_lab.text import counted


@dataclass(frozen=True)
class InputFile(FileFacts):
    """What is known of one input."""

    role: str  # "base", "tuned", or "init": what a PiSSA adapter started from


@dataclass(frozen=True)
class MergeInputs:
    """Checkpoints that are open, or were: what a plan says of them stays. Use as a context manager."""

    base: Checkpoint
    tuned: tuple[Checkpoint, ...]
    init: tuple[Checkpoint | None, ...]  # one per tuned
    states: tuple[FileState, ...] = field(repr=False)  # of all files, when they were opened

    @property
    def with_roles(self) -> list[tuple[str, Checkpoint]]:
        """Every checkpoint: the base, the tuned ones, and what those started from."""
        init = [("init", ck) for ck in self.init if ck is not None]
        return [("base", self.base), *(("tuned", ck) for ck in self.tuned), *init]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [ck for _, ck in self.with_roles]

    def facts(self, hash: str) -> tuple[InputFile, ...]:
        """Size and fingerprint of each; "sha256" reads every byte."""
        facts = [(role, file_facts(ck, hash)) for role, ck in self.with_roles]
        return tuple(InputFile(f.path, f.bytes, f.fingerprint, role) for role, f in facts)

    @property
    def downloads(self) -> list[dict[str, Any] | None]:
        """How each came from the Hugging Face Hub; None where its provenance does not say so."""
        return [downloaded(ck) for ck in self.checkpoints]

    @contextmanager
    def opened_again(self) -> Iterator[None]:
        """The same files, open for the time of the block; where they still are, they stay it.

        Raises:
            ParameterError: one of them has changed since: its size, time of change or header.
            CorruptFileError: one of them cannot be opened any more.
        """
        refuse_changed(self.states)
        closed = [ck for ck in self.checkpoints if ck.closed]
        with ExitStack() as stack:
            for ck in closed:
                refuse_changed_header(ck)
                stack.callback(ck.close)
                ck.reopen()
            yield

    def __enter__(self) -> "MergeInputs":
        return self

    def __exit__(self, *exc: object) -> None:
        for ck in self.checkpoints:
            ck.close()


def merged_in_itself(spec: MergeSpec) -> MergeSpec:
    """The spec; of a base alone that has its adapter beside its weights, with that adapter as `tuned`.

    Raises:
        CorruptFileError, UnsafeFileError, LayoutError: as `open_checkpoint`.
    """
    if spec.tuned or spec.method not in ("auto", "lora", "pissa", "miss", "adapters"):
        return spec
    with open_checkpoint(spec.base) as base:
        return spec.changed(tuned=(spec.base,)) if base.kind == "unmerged" else spec


@checked
def open_inputs(spec: MergeSpec) -> MergeInputs:
    """Open the base, the tuned files and, of PiSSA adapters, what they started from. Only headers are read.

    Raises:
        ParameterError: more or fewer starts than adapters.
        CorruptFileError, UnsafeFileError, LayoutError: as `open_checkpoint`.
    """
    with ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(spec.base))
        tuned, init = open_tuned(spec, stack)
        base = _frozen_base(base, tuned, stack)
        states = tuple(state for ck in (base, *tuned, *init) if ck is not None for state in file_states(ck))
        stack.pop_all()
    return MergeInputs(base, tuned, init, states)


def open_tuned(spec: MergeSpec, stack: ExitStack) -> tuple[tuple[Checkpoint, ...], tuple[Checkpoint | None, ...]]:
    """The tuned files and what each started from, entered into `stack`.

    Raises:
        ParameterError, CorruptFileError, UnsafeFileError, LayoutError: as `open_inputs`.
    """
    paths = init_paths(spec.pissa_init, len(spec.tuned))
    tuned = tuple(stack.enter_context(open_checkpoint(path)) for path in spec.tuned)
    for i, ck in enumerate(tuned):
        if ck.kind == "unmerged":
            ck.keep_adapter(value_of(spec.parameters.get("adapter"), i))
    init = tuple(None if path in (None, SVD) else stack.enter_context(open_checkpoint(path)) for path in paths)
    return tuned, init


def _frozen_base(base: Checkpoint, tuned: Sequence[Checkpoint], stack: ExitStack) -> Checkpoint:
    """The base; where a tuned file holds the frozen model that its adapter belongs to, that model.

    Raises:
        LayoutError: a base with an adapter of its own that is not merged, or one that is another model.
        ParameterError: adapters that lie in several such files.
    """
    paths = list(dict.fromkeys(ck.path for ck in tuned if ck.part))
    if base.kind == "unmerged" and not any(samefile(base.path, path) for path in paths):
        raise LayoutError(
            f"the base {base.path} holds {base.reason}.\nMerge it in itself first: give it as tuned too, alone."
        )
    if not paths:
        return base
    if len(paths) > 1:
        raise ParameterError(f"{paths[0]} and {paths[1]} each hold a model and its adapter; merge them one by one")
    own = stack.enter_context(open_checkpoint(paths[0]))
    own.keep_frozen()
    if base.layout is not None and own.layout is not None and str(own.layout) != str(base.layout):
        raise LayoutError(f"{own.path} holds a frozen {own.layout};\nthe base is {base.layout}.")
    if base.part or not samefile(base.path, own.path):
        base.close()
    return own


def value_of(given: Any, i: int) -> Any:
    """What was given for the i-th adapter."""
    return given[i] if isinstance(given, list) and i < len(given) else given


def init_paths(pissa_init: Path | Sequence[Path | None] | None, count: int) -> list[Path | None]:
    """What each of `count` adapters started from; a path that is given alone is that of all."""
    if not isinstance(pissa_init, list):
        return [pissa_init] * count  # type: ignore[list-item]  # a path or None
    if len(pissa_init) != count:
        raise ParameterError(
            f"pissa_init names {counted(len(pissa_init), 'file')}; one per adapter is needed, {count} in all"
        )
    return list(pissa_init)
