"""The graphs of exported folders in onnxruntime: tokens and a state go in, logits and the next state come out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_lab.arguments import shown_value
from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.export.external_data import check_external_data
from rwkv_lab.export.onnx_fixed_sizes import FixedSizes
from rwkv_lab.export.onnx_folder import INITIAL_STATE, SEQUENCE, STATES, STEP, past_names
from rwkv_lab.machine import give_memory_back

State = dict[str, np.ndarray]
MASK = "attention_mask"
_COPIED = 256 * 2**20  # bytes of a folder up to which float32 weights are copied to read prompts faster


class Graphs(Protocol):
    """What `OnnxModel` runs. `context` is how many tokens a text may have, None for any number."""

    vocab_size: int
    context: int | None

    def create_state(self, batch_size: int) -> State:
        """The state before the first token."""
        ...

    def run(self, ids: np.ndarray, state: State, mask: np.ndarray | None) -> tuple[np.ndarray, State]:
        """int64 `[B,T]` and a state -> logits float32 `[B,T,V]`, or `[B,V]` of the last token, and the next state."""
        ...


class RecurrentGraphs:
    """RWKV: a graph for a sequence and one for a token; the state is wkv, att_shift and ffn_shift, float32."""

    context: int | None = None

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        providers: Sequence[str] | None,
        threads: int | None,
        low_memory: bool,
    ) -> None:
        self.vocab_size: int = manifest["layout"]["vocab_size"]
        # float32 weights can be used where the file is mapped. For one token that is as fast as a copy in the order of
        # the products; a prompt takes a seventh longer, and a large model a fraction of the memory. Those of int4 are
        # always copied: onnxruntime rounds what they multiply in that order alone.
        weights, size = manifest["weights"], sum(facts["bytes"] for facts in manifest["files"].values())
        rounded = weights == "int4" or weights != "fp32" and not low_memory
        reorder = rounded or size <= _COPIED and not low_memory

        def opened(name: str) -> Any:
            return open_session(folder / name, providers, threads, reorder if name == SEQUENCE else rounded, low_memory)

        self._opened, self._sessions = opened, {}
        self._alone = low_memory and rounded  # one graph has copies of the weights at a time
        for name in (STEP, SEQUENCE):  # a text is read before it is continued
            self._session(name)
        try:
            with np.load(folder / INITIAL_STATE, allow_pickle=False) as parts:
                self._initial = {name: parts[name] for name in STATES}
        except (OSError, ValueError, KeyError) as e:
            raise CorruptFileError(f"{folder / INITIAL_STATE} holds no state: {e}") from e

    def create_state(self, batch_size: int) -> State:
        """As `Graphs.create_state`; tuned where the model's was."""
        return {name: np.repeat(part, batch_size, axis=0) for name, part in self._initial.items()}

    def run(self, ids: np.ndarray, state: State, mask: np.ndarray | None) -> tuple[np.ndarray, State]:
        """As `Graphs.run`."""
        if mask is not None:
            raise ParameterError("attention_mask is for models with attention; an RWKV reads every token it is given.")
        state = self._checked(state, len(ids))
        session = self._session(STEP if ids.shape[1] == 1 else SEQUENCE)
        logits, *parts = session.run(["logits", *(f"{name}_out" for name in STATES)], {"tokens": ids, **state})
        return logits, dict(zip(STATES, parts, strict=True))

    def _session(self, name: str) -> Any:
        if (session := self._sessions.get(name)) is None:
            if self._alone:
                self._sessions.clear()
            session = self._sessions[name] = self._opened(name)
        return session

    def _checked(self, state: State, batch_size: int) -> State:
        for name, initial in self._initial.items():
            part = state.get(name)
            if not isinstance(part, np.ndarray) or part.dtype != np.float32:
                raise ParameterError(f"The state's {name} is {shown_value(part)}; it must be a float32 array.")
            if part.shape != (batch_size, *initial.shape[1:]):
                raise ParameterError(
                    f"The state's {name} has shape {list(part.shape)}; "
                    f"for these tokens it must be {[batch_size, *initial.shape[1:]]}."
                )
        return {name: state[name] for name in STATES}


class CachedGraph:
    """A causal language model: one graph. The state is keys and values of what was read, `[B,H,P,D]` float32 of each
    layer, and the mask of it, `[B,P]` int64: 0 where a row is padded, in front."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        providers: Sequence[str] | None,
        threads: int | None,
        low_memory: bool,
    ) -> None:
        layout = manifest["layout"]
        self.vocab_size: int = layout["vocab_size"]
        self.context: int | None = layout["context"]
        self._names = past_names(layout["n_layer"])
        self._shapes = dict(zip(self._names, layout["cache"], strict=True))  # [heads, size of a head]
        self._sizes = FixedSizes(**manifest["sizes"]) if manifest.get("sizes") else None
        if self._sizes is not None:
            self.context = min(self._sizes.context, self.context or self._sizes.context)
        reorder = not low_memory or manifest["weights"] == "int4"
        self._session = open_session(folder / SEQUENCE, providers, threads, reorder, low_memory)

    def create_state(self, batch_size: int) -> State:
        """As `Graphs.create_state`: of no token."""
        past = {name: np.zeros((batch_size, H, 0, D), np.float32) for name, (H, D) in self._shapes.items()}
        return {MASK: np.zeros((batch_size, 0), np.int64), **past}

    def run(self, ids: np.ndarray, state: State, mask: np.ndarray | None) -> tuple[np.ndarray, State]:
        """As `Graphs.run`.

        Args:
            mask: of these tokens; None for all of them.
        """
        before = self._checked(state, len(ids))
        length = before.shape[1] + ids.shape[1]
        if self.context is not None and length > self.context:
            raise ParameterError(f"The text has {length} tokens; the model's context ends at {self.context}.")
        both = np.concatenate([before, np.ones_like(ids) if mask is None else _checked_mask(mask, ids.shape)], axis=1)
        if (np.diff(both, axis=1) < 0).any():
            raise ParameterError("attention_mask has a 0 behind a 1: rows are padded on the left, before their tokens.")
        past = {name: state[name] for name in self._names}
        if (sizes := self._sizes) is None:
            logits, parts = self._call(ids, both, past)
        else:
            logits, parts = sizes.run(self._call, ids, both, past)
        return (logits[:, -1] if ids.shape[1] == 1 else logits), {MASK: both, **parts}

    def _call(self, ids: np.ndarray, mask: np.ndarray, past: State) -> tuple[np.ndarray, State]:
        outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._names)]
        logits, *parts = self._session.run(outputs, {"input_ids": ids, MASK: mask, **past})
        return logits, dict(zip(self._names, parts, strict=True))

    def _checked(self, state: State, batch_size: int) -> np.ndarray:
        """The mask of what was read."""
        mask = state.get(MASK)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.int64 or mask.ndim != 2 or len(mask) != batch_size:
            raise ParameterError(f"The state's {MASK} is {shown_value(mask)}; it must be int64 [{batch_size}, tokens].")
        for name, (H, D) in self._shapes.items():
            part, expected = state.get(name), (batch_size, H, mask.shape[1], D)
            if not isinstance(part, np.ndarray) or part.dtype != np.float32 or part.shape != expected:
                found = list(part.shape) if isinstance(part, np.ndarray) else shown_value(part)
                raise ParameterError(f"The state's {name} is {found}; it must be float32 {list(expected)}.")
        return mask


def _checked_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(mask)
    if found.shape != shape or found.dtype.kind not in "iub" or not np.isin(found, (0, 1)).all():
        raise ParameterError(f"attention_mask must be 0 and 1 of shape {list(shape)}, as the tokens.")
    return found.astype(np.int64)


def open_session(
    path: Path, providers: Sequence[str] | None, threads: int | None, reorder: bool = True, low_memory: bool = False
) -> Any:
    """A session of onnxruntime on a graph.

    Args:
        reorder: have weights copied into the order that products of matrices read them in.
        low_memory: leave weights in the file, which is mapped: none is cast in advance, and what a call needs is given
            back after it.

    Raises:
        ParameterError: onnxruntime or the provider is missing.
        CorruptFileError: it cannot be opened.
        UnsafeFileError: its weights lie outside its folder, or behind a link.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise ParameterError(f"{path} needs the package onnxruntime.\nInstall it: pip install onnxruntime") from e
    wanted = ["CPUExecutionProvider"] if providers is None else list(providers)
    there = onnxruntime.get_available_providers()
    if wrong := [name for name in wanted if name not in there]:
        raise ParameterError(f"onnxruntime has no provider {wrong[0]!r} here; it has {', '.join(there)}.")
    check_external_data(path)  # onnxruntime follows links
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of each initialiser that is not used by its optimiser
    if not reorder:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if low_memory:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # The first alone does not do: the other folds casts of weights, too.
        folding = "ConstantFolding;Level1_RuleBasedTransformer"
        options.add_session_config_entry("optimization.disable_specified_optimizers", folding)
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # else all casts come first
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        if low_memory:
            give_memory_back()  # what opening it took
        return session
    except Exception as e:  # onnxruntime has no class of its own for them
        raise CorruptFileError(f"onnxruntime cannot open {path}: {str(e).splitlines()[0][:300]}") from e
