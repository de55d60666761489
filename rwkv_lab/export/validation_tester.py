"""Whether an exported model computes what the model does: onnxruntime beside torch, at shapes that were not traced.

In float32, logits and state are held to errors; with fewer bits, predictions on text are: mean Kullback-Leibler
divergence (KL) and how often the likeliest token stays the same. The limits are `GATES`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_lab.checkpoint import write_text
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ValidationError
from rwkv_lab.export.family import Reference
from rwkv_lab.export.onnx_folder import MANIFEST
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.export.validation_metrics import ArrayError, PredictionErrors, Predictions, array_error
from rwkv_lab.machine import memory_of

SHAPES = ((1, 1), (1, 2), (3, 17), (1, 67), (1, 521))  # batch and length; what was traced is (2, 5)
LONGEST = 1024  # tokens of a sample that are compared
_PIECE = 256  # tokens that are read at once: their logits are [T,V]
_SPLIT = 7  # tokens of the first part, where a text is read in two
_DRIFT = (1, 2, 5, 16, 67, 256, 521, LONGEST)  # tokens after which states are compared
_GREEDY = 16  # tokens that both write after a sample
_TIMED, _PROMPT, _ROUNDS = 32, 128, 3  # tokens decoded one by one; tokens read at once, and how often


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
    """

    loaded: int | None
    files: int
    ratio: float | None


class ValidationTester:
    """Compares an exported folder with the model that it was made from.

    Args:
        reference: the model.
        folder: what `export_onnx` wrote.
        samples: texts to compare on, as tokens.
    """

    def __init__(self, reference: Reference, folder: Path, samples: list[list[int]]):
        self.reference, self.folder, self.graph = reference, folder, OnnxModel(folder)
        self.context = LONGEST if reference.context is None else min(LONGEST, reference.context)
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
        found = Comparison(**asdict(self._predictions()))
        for shape in self.shapes:
            tokens = self._random(shape)
            logits, state = self.graph.run(tokens)
            expected, after = self.reference.run(tokens)
            parts = {"logits": (logits, expected[:, -1] if shape[1] == 1 else expected)}
            parts |= {name: (state[name], part) for name, part in self.reference.arrays(after).items()}
            found.arrays |= {f"{name} at {shape[0]}x{shape[1]}": array_error(*pair) for name, pair in parts.items()}
        found.errors = {name: error.relative for name, error in found.arrays.items()}
        found.drift = self._drift(self.samples[0])
        found.greedy_prefixes = [self._greedy(ids[:32]) for ids in self.samples]
        found.greedy_prefix = found.greedy_prefixes[0]
        return found

    def _predictions(self) -> Predictions:
        errors = PredictionErrors()
        for ids in self.samples:
            mine, theirs = None, None
            for at in range(0, len(ids), _PIECE):
                tokens = np.array([ids[at : at + _PIECE]], np.int64)
                q, mine = self.graph.run(tokens, mine)
                p, theirs = self.reference.run(tokens, theirs)
                errors.add(q.reshape(-1, q.shape[-1]), p[0], np.array(ids[at + 1 : at + 1 + len(p[0])], np.int64))
        return errors.result()

    def _drift(self, ids: list[int]) -> dict[int, dict[str, float]]:
        mine, theirs, found, at = None, None, {}, 0
        for end in (*(end for end in _DRIFT if end < len(ids)), len(ids)):
            tokens = np.array([ids[at:end]], np.int64)
            (_, mine), (_, theirs) = self.graph.run(tokens, mine), self.reference.run(tokens, theirs)
            expected, at = self.reference.arrays(theirs), end
            found[end] = {name: array_error(mine[name], part).relative for name, part in expected.items()}
        return found

    def _greedy(self, ids: list[int]) -> int:
        """How many tokens both choose alike after the same text."""
        given = np.array([ids], np.int64)
        (mine, state), (theirs, after) = self.graph.run(given), self.reference.run(given)
        for done in range(_GREEDY):
            token = int(theirs[0, -1].argmax())
            if int((mine[0, -1] if mine.ndim == 3 else mine[0]).argmax()) != token:
                return done
            given = np.array([[token]], np.int64)
            (mine, state), (theirs, after) = self.graph.run(given, state), self.reference.run(given, after)
        return _GREEDY

    def benchmark_inference_speed(self) -> Speed:
        """Milliseconds of onnxruntime and of the model in torch, each in turn."""
        one, prompt = np.zeros((1, 1), np.int64), self._random((1, min(_PROMPT, self.context)))
        state, after = self.graph.create_state(1), None
        mine: list[float] = []
        theirs: list[float] = []
        for number in range(min(4 + _TIMED, self.context)):  # the first are to warm up
            seconds, (_, state) = _timed(lambda state=state: self.graph.run(one, state))
            other, (_, after) = _timed(lambda after=after: self.reference.run(one, after))
            if number >= 4 or self.context <= 4:
                mine.append(seconds)
                theirs.append(other)
        read, read_too = [], []
        for _ in range(_ROUNDS):
            read.append(_timed(lambda: self.graph.run(prompt))[0])
            read_too.append(_timed(lambda: self.reference.run(prompt))[0])
        a, b, c, d = (float(np.median(taken)) * 1000 for taken in (mine, theirs, read, read_too))
        return Speed(a, b, b / a, prompt.shape[1], c, d, d / c)

    def measure_memory_usage(self) -> Memory:
        """What another copy of the exported model takes, opened and run once in this process."""
        files = sum(path.stat().st_size for path in self.folder.iterdir())
        before = memory_of("RssAnon")
        other = OnnxModel(self.folder)
        other.run(np.zeros((1, 1), np.int64))
        other.run(np.zeros((1, 2), np.int64))
        after = memory_of("RssAnon")
        if before is None or after is None:
            return Memory(None, files, None)
        return Memory(max(after - before, 0), files, max(after - before, 0) / files)

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


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found
