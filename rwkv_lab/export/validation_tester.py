"""Whether an exported model computes what the model does: onnxruntime beside torch, at shapes that were not traced.

In float32, logits and state are held to errors; with fewer bits, predictions on text are: mean Kullback-Leibler
divergence (KL) and how often the likeliest token stays the same. The limits are `GATES`.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_lab.checkpoint import write_text
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ValidationError
from rwkv_lab.export.family import Reference, Text
from rwkv_lab.export.onnx_folder import MANIFEST
from rwkv_lab.export.onnx_graphs import State
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.export.samples import LONGEST
from rwkv_lab.export.validation_metrics import ArrayError, PredictionErrors, Predictions, array_error
from rwkv_lab.machine import give_memory_back, memory_of

SHAPES = ((1, 1), (1, 2), (3, 17), (1, 67), (1, 521))  # batch and length; what was traced is (2, 5)
_PIECE = 256  # tokens that are read at once: their logits are [T,V]
_SPLIT = 7  # tokens of the first part, where a text is read in two
_DRIFT = (1, 2, 5, 16, 67, 256, 521, LONGEST)  # tokens after which states are compared
_LARGE = 256 * 2**20  # bytes of a folder from which on weights stay in their file
_GREEDY = 16  # tokens that both write after a sample
_STARTS = 32  # tokens of a sample after which both write
_PROMPT, _WARM, _TIMED, _ROUNDS = 128, 3, 12, 3  # tokens read at once; after them to warm up, and timed; how often

Pieces = Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Gate:
    """What weights stored in some way may cost.

    error: largest error of logits and state, relative to their scale; None where it does not count.
    split: the same between a text read at once and in parts; None where activations are rounded for all tokens of a
        call together.
    kl: mean, in nats per token.
    top1: share of positions whose likeliest token stays the same.
    """

    error: float | None
    split: float | None
    kl: float
    top1: float


# By how weights are stored. Small models lose more: these are defaults for models that people use.
GATES = {
    "fp32": Gate(1e-4, 1e-4, 1e-6, 1.0),
    "fp16": Gate(None, 1e-4, 1e-4, 0.99),
    "int8": Gate(None, None, 5e-3, 0.975),
    "int4": Gate(None, None, 5e-2, 0.9),
}


@dataclass
class Comparison(Predictions):
    """What was found; the predictions are those on the samples.

    errors: by shape and output, such as "logits at 3x17", the largest error relative to the scale of what was expected.
    arrays: the same in detail.
    drift: tokens read -> by part of the state, its error relative to its scale; along the first sample.
    greedy_prefix: of 16 tokens that both write after the first sample, how many are the same from the first on.
    greedy_prefixes: the same after each sample.
    """

    errors: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, ArrayError] = field(default_factory=dict)
    drift: dict[int, dict[str, float]] = field(default_factory=dict)
    greedy_prefix: int = 0
    greedy_prefixes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """Medians, both measured in turn in one run. A ratio above 1: onnxruntime is faster.

    decode_ms: of one token through onnxruntime, in milliseconds.
    prefill_ms: of a prompt of `prompt` tokens.
    """

    decode_ms: float
    torch_decode_ms: float
    decode_ratio: float
    prompt: int
    prefill_ms: float
    torch_prefill_ms: float
    prefill_ratio: float


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system reports none.

    loaded: what opening the folder and running it once takes, beside files that are mapped into memory.
    files: of the folder.
    ratio: of loaded to files.
    low_memory: whether it was opened as `OnnxModel` is with low_memory=True, here and where speed was measured.
    """

    loaded: int | None
    files: int
    ratio: float | None
    low_memory: bool = False


class ValidationTester:
    """Compares an exported folder with the model that it was made from.

    Args:
        reference: the model.
        folder: what `export_onnx` wrote.
        samples: texts to compare on, as tokens.
    """

    def __init__(self, reference: Reference, folder: Path, samples: list[list[int]]):
        self.reference, self.folder = reference, folder
        self.low_memory = sum(path.stat().st_size for path in folder.iterdir()) > _LARGE
        before = memory_of("RssAnon")
        self.graph = OnnxModel(folder, low_memory=self.low_memory)
        self.graph.run(np.zeros((1, 2), np.int64))
        self.graph.run(np.zeros((1, 1), np.int64))
        after = memory_of("RssAnon")
        self._opened = None if before is None or after is None else max(after - before, 0)
        self.context = min(context for context in (LONGEST, reference.context, self.graph.context) if context)
        self.samples = [ids[: self.context] for ids in samples if len(ids) > 1]
        self.shapes = [(B, min(T, self.context)) for B, T in SHAPES]
        self.gate = GATES[self.graph.weights]

    def test_model_functionality(self) -> list[Check | NotApplicable]:
        """Whether it runs at every shape: logits of the right size, none of them NaN or infinite; and whether a text
        that is read in two parts, or token by token, ends where it does when it is read at once."""
        wrong = 0
        for tokens in map(self._random, self.shapes):
            logits, state = self.graph.run(tokens)
            finite = all(np.isfinite(part).all() for part in (logits, *state.values()))
            wrong += not finite or logits.shape[-1] != self.reference.vocab_size
        name = f"shapes at which onnxruntime gives NaN, infinity or another size, of {len(self.shapes)}"
        checks: list[Check | NotApplicable] = [Check(name, wrong, 0, not wrong)]
        name = "a text read in two parts, and token by token: largest relative error of logits and state"
        if self.gate.split is None:
            return [*checks, NotApplicable(name, "activations are rounded for all tokens of a call together")]
        worst = self._split_error(self._random((2, 23)))
        return [*checks, Check(name, worst, self.gate.split, worst <= self.gate.split)]

    def _split_error(self, tokens: np.ndarray) -> float:
        whole, last = self.graph.run(tokens)
        _, first = self.graph.run(tokens[:, :_SPLIT])
        second, ended = self.graph.run(tokens[:, _SPLIT:], first)
        pairs = [(second[:, -1], whole[:, -1]), *((ended[name], last[name]) for name in last)]
        state = None
        for t in range(tokens.shape[1]):
            step, state = self.graph.run(tokens[:, t : t + 1], state)
            pairs.append((step, whole[:, t]))
        return max(array_error(*pair).relative for pair in pairs)

    def compare_model_outputs(self) -> Comparison:
        """Logits and states at every shape, predictions on the samples, states along the first of them, and what both
        write after each."""
        shapes = [self._random(shape) for shape in self.shapes]
        pieces = [[_row(ids[at : at + _PIECE]) for at in range(0, len(ids), _PIECE)] for ids in self.samples]
        starts = [ids[: self._start] for ids in self.samples]
        written = self._write(starts)
        read = self.reference.read(  # at once: a large model is read from its file each time
            [
                *(Text([tokens], True) for tokens in shapes),
                *(Text(one, False) for one in pieces),
                Text(along := self._drift_pieces(self.samples[0]), True, False),
                *(Text([_row(ids + tokens[:-1])], False) for ids, tokens in zip(starts, written, strict=True)),
            ]
        )
        arrays: dict[str, ArrayError] = {}
        for shape, tokens in zip(self.shapes, shapes, strict=True):
            give_memory_back()  # of a large model, what all this leaves behind is half of what it takes
            arrays |= self._errors(shape, tokens, next(read))
        errors = PredictionErrors()
        for ids, parts in zip(self.samples, pieces, strict=True):
            give_memory_back()
            self._predict(ids, parts, next(read), errors)
        found = Comparison(**asdict(errors.result()), arrays=arrays)
        found.errors = {name: error.relative for name, error in arrays.items()}
        found.drift = self._drift(along, next(read))
        found.greedy_prefixes = [
            _alike(len(ids), tokens, next(next(read))[0][0]) for ids, tokens in zip(starts, written, strict=True)
        ]
        found.greedy_prefix = found.greedy_prefixes[0]
        return found

    def _errors(self, shape: tuple[int, int], tokens: np.ndarray, read: Pieces) -> dict[str, ArrayError]:
        logits, state = self.graph.run(tokens)
        expected, after = next(read)
        parts = {"logits": (logits, expected[:, -1] if shape[1] == 1 else expected)}
        parts |= {name: (state[name], part) for name, part in after.items()}
        return {f"{name} at {shape[0]}x{shape[1]}": array_error(*pair) for name, pair in parts.items()}

    def _predict(self, ids: list[int], pieces: list[np.ndarray], read: Pieces, errors: PredictionErrors) -> None:
        state, at = None, 0
        for tokens, (expected, _) in zip(pieces, read, strict=True):
            logits, state = self.graph.run(tokens, state)
            at += tokens.shape[1]
            following = np.array(ids[at - tokens.shape[1] + 1 : at + 1], np.int64)
            errors.add(logits.reshape(-1, logits.shape[-1]), expected[0], following)

    def _drift_pieces(self, ids: list[int]) -> list[np.ndarray]:
        ends = [*(end for end in _DRIFT if end < len(ids)), len(ids)]
        return [_row(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _drift(self, pieces: list[np.ndarray], read: Pieces) -> dict[int, dict[str, float]]:
        state, found, end = None, {}, 0
        for tokens, (_, expected) in zip(pieces, read, strict=True):
            _, state = self.graph.run(tokens, state)
            end += tokens.shape[1]
            found[end] = {name: array_error(state[name], part).relative for name, part in expected.items()}
        return found

    @property
    def _start(self) -> int:
        """Tokens of a sample after which both write."""
        return max(1, min(_STARTS, self.context - _GREEDY))

    def _write(self, starts: list[list[int]]) -> list[list[int]]:
        """The tokens that the graph finds likeliest, one after the other, after each of some texts."""
        read = [self.graph.run(_row(ids)) for ids in starts]  # at once: of a large model one graph is open at a time
        return [self._continue(len(ids), *one) for ids, one in zip(starts, read, strict=True)]

    def _continue(self, length: int, logits: np.ndarray, state: State) -> list[int]:
        tokens: list[int] = []
        while True:
            tokens.append(int((logits[0, -1] if logits.ndim == 3 else logits[0]).argmax()))
            if len(tokens) == _GREEDY or length + len(tokens) > self.context:
                return tokens
            logits, state = self.graph.run(_row(tokens[-1:]), state)

    def benchmark_inference_speed(self) -> Speed:
        """Milliseconds of onnxruntime and of the model in torch, each in turn: a prompt, and the tokens after it."""
        after = min(_WARM + _TIMED, max(self.context // 2, 1))
        prompt = self._random((1, max(1, min(_PROMPT, self.context - after))))
        pieces = [prompt, *(np.zeros((1, 1), np.int64) for _ in range(after))]
        mine, theirs = [], []
        for _ in range(_ROUNDS):
            mine.append(self._seconds(pieces))
            theirs.append(self.reference.seconds(pieces))
        first = 1 + (_WARM if after > _WARM else 0)
        a, b = (1000 * float(np.median([taken[first:] for taken in both])) for both in (mine, theirs))
        c, d = (1000 * float(np.median([taken[0] for taken in both])) for both in (mine, theirs))
        return Speed(a, b, b / a, prompt.shape[1], c, d, d / c)

    def _seconds(self, pieces: list[np.ndarray]) -> list[float]:
        state, found = None, []
        for tokens in pieces:
            start = time.perf_counter()
            _, state = self.graph.run(tokens, state)
            found.append(time.perf_counter() - start)
        return found

    def measure_memory_usage(self) -> Memory:
        """What opening the exported model took, and running it for the first time."""
        files = sum(path.stat().st_size for path in self.folder.iterdir())
        return Memory(self._opened, files, None if self._opened is None else self._opened / files, self.low_memory)

    def checks(self, found: Comparison) -> list[Check | NotApplicable]:
        """What was found, against the gate.

        Raises:
            ValidationError: in float32, logits or states are not the model's: the graph computes something else.
        """
        gate, stored = self.gate, self.graph.weights
        where = max(found.errors, key=lambda name: found.errors[name])
        worst = found.errors[where]
        error_name = f"onnxruntime and torch: largest relative error ({where})"
        if gate.error is not None and not worst <= gate.error:
            raise ValidationError(
                f"The ONNX graphs do not compute what the model does: {where} are {worst:.3g} apart, relative to their "
                f"scale.\nThe limit is {gate.error:g}."
            )
        error = NotApplicable(error_name, f"{worst:.3g}; weights are {stored}, so predictions count")
        kl, top1, on = found.kl_mean, found.top1, f"on {found.tokens} tokens"
        return [
            error if gate.error is None else Check(error_name, worst, gate.error, worst <= gate.error),
            Check(f"mean KL in nats per token, {on}", kl, gate.kl, kl <= gate.kl),
            Check(f"share of likeliest tokens that stay, {on}", top1, gate.top1, top1 >= gate.top1),
        ]

    def generate_validation_report(
        self,
        path: Path,
        found: Comparison,
        checks: list[Check | NotApplicable],
        speed: Speed | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Write what was measured as JSON, with the verdict.

        Raises:
            OutputError: it cannot be written.
        """
        failed = [str(check.name) for check in checks if isinstance(check, Check) and not check.passed]
        report = {
            "verdict": f"FAIL: {failed[0]}" if failed else "PASS",
            "weights": self.graph.weights,
            "gate": asdict(self.gate),
            "structure": structure(self.folder),
            "measured": asdict(found),
            "speed": None if speed is None else asdict(speed),
            "memory": None if memory is None else asdict(memory),
            "checks": [str(check) for check in checks],
        }
        write_text(path, json.dumps(report, indent=1) + "\n", overwrite=True)

    def _random(self, shape: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(sum(shape)).integers(0, self.reference.vocab_size, shape)


def structure(folder: Path) -> dict[str, Any]:
    """Of each graph in a folder: opset, IR version, axes of inputs and outputs, and how many operators of each kind it
    has, in sub-graphs too; and size and SHA-256 of every file as the folder's manifest states them."""
    import onnx

    from rwkv_lab.export.onnx.check import nodes_of, shapes_of

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        kinds = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in nodes_of(model))
        found[path.name] = {
            "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            "ir_version": model.ir_version,
            "shapes": shapes_of(model),
            "operators": dict(kinds.most_common()),
        }
    return {"graphs": found, "files": json.loads((folder / MANIFEST).read_text("utf-8")).get("files", {})}


def _row(ids: list[int]) -> np.ndarray:
    return np.array([ids], np.int64)


def _alike(start: int, tokens: list[int], logits: np.ndarray) -> int:
    """How many tokens after the first `start` are the likeliest of logits `[T,V]`, too, up to the first that is not."""
    chosen = logits[start - 1 :].argmax(-1)
    return next((i for i, token in enumerate(tokens) if token != chosen[i]), len(tokens))
