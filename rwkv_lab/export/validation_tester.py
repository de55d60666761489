"""Whether an exported model computes what the model does: onnxruntime beside torch, at shapes that were not traced.

In float32, logits and state are held to errors; with fewer bits, predictions on text are:
mean Kullback-Leibler divergence (KL) and how often the likeliest token stays the same. The limits are `GATES`.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from rwkv_lab.checkpoint import write_text
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ValidationError
from rwkv_lab.export.family import Reference
from rwkv_lab.export.onnx_model import OnnxModel
from rwkv_lab.model.weight_only import agreement_of_logits

SHAPES = ((1, 1), (1, 2), (3, 17), (1, 67), (1, 521))  # batch and length; what was traced is (2, 5)
LONGEST = 1024  # tokens of a sample that are compared
_SPLIT = 7  # tokens of the first part, where a text is read in two
_ENOUGH = 100  # tokens below which percentiles mean nothing
_TIMED = 32  # tokens


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
class Comparison:
    """What was found. Errors are the largest ones, relative to the scale of what was expected."""

    errors: dict[str, float] = field(default_factory=dict)  # by shape and output
    tokens: int = 0  # of text
    kl_mean: float = float("nan")
    kl_standard_error: float = float("nan")
    kl_percentiles: dict[str, float] = field(default_factory=dict)  # empty below 100 tokens
    kl_largest: float = float("nan")
    top1: float = float("nan")
    top1_standard_error: float = float("nan")
    perplexity_ratio: float = float("nan")  # of the exported model to the model, on the next tokens of the text
    greedy_prefix: int = 0  # of 16 tokens that both write, how many are the same from the first on


class ValidationTester:
    """Compares an exported folder with the model that it was made from.

    Args:
        reference: the model.
        folder: what `export_onnx` wrote.
        samples: texts to compare on, as tokens.
    """

    def __init__(self, reference: Reference, folder: Path, samples: list[list[int]]):
        self.reference, self.graph = reference, OnnxModel(folder)
        context = LONGEST if reference.context is None else min(LONGEST, reference.context)
        self.samples = [ids[:context] for ids in samples if len(ids) > 1]
        self.shapes = [(B, min(T, context)) for B, T in SHAPES]
        self.gate = GATES[self.graph.weights]

    def test_model_functionality(self) -> list[Check | NotApplicable]:
        """Whether it runs at every shape: logits of the right size, none of them NaN or infinite; and whether a text
        that is read in two parts, or token by token, ends where it does when it is read at once."""
        wrong = 0
        for tokens in map(self._random, self.shapes):
            logits, state = self.graph.run(tokens)
            finite = all(np.isfinite(part).all() for part in (logits, *state.values()))
            wrong += not finite or logits.shape[-1] != self.reference.vocab_size
        checks: list[Check | NotApplicable] = [
            Check(
                f"shapes at which onnxruntime gives NaN, infinity or another size, of {len(self.shapes)}",
                wrong,
                0,
                not wrong,
            )
        ]
        name = "a text read in two parts, and token by token: largest relative error of logits and state"
        if self.gate.split is None:
            return [*checks, NotApplicable(name, "activations are rounded for all tokens of a call together")]
        tokens = self._random((2, 23))
        whole, last = self.graph.run(tokens)
        _, first = self.graph.run(tokens[:, :_SPLIT])
        second, ended = self.graph.run(tokens[:, _SPLIT:], first)
        errors = [_error(second[:, -1], whole[:, -1]), *(_error(ended[n], last[n]) for n in last)]
        state = None
        for t in range(tokens.shape[1]):
            step, state = self.graph.run(tokens[:, t : t + 1], state)
            errors.append(_error(step, whole[:, t]))
        return [*checks, Check(name, max(errors), self.gate.split, max(errors) <= self.gate.split)]

    def compare_model_outputs(self) -> Comparison:
        """Logits and states at every shape, and predictions on the samples."""
        found = Comparison()
        for shape in self.shapes:
            tokens = self._random(shape)
            logits, state = self.graph.run(tokens)
            expected, after = self.reference.run(tokens)
            parts = {"logits": (logits, expected[:, -1] if shape[1] == 1 else expected)}
            parts |= {name: (state[name], part) for name, part in self.reference.arrays(after).items()}
            found.errors |= {f"{name} at {shape[0]}x{shape[1]}": _error(*pair) for name, pair in parts.items()}
        self._compare_texts(found)
        found.greedy_prefix = self._greedy(self.samples[0][:32])
        return found

    def _compare_texts(self, found: Comparison) -> None:
        kl, same, loss = [], [], np.zeros(2)
        for ids in self.samples:
            tokens = np.array([ids], np.int64)
            q, p = (torch.from_numpy(run(tokens)[0][0]).double() for run in (self.graph.run, self.reference.run))
            off = agreement_of_logits(q, p)  # refuses other shapes
            found.kl_largest = max(off.kl_worst, 0.0 if np.isnan(found.kl_largest) else found.kl_largest)
            log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).numpy())
            same.append(_same_likeliest(q, p))
            following = tokens[0, 1:]
            loss -= [float(log[np.arange(len(following)), following].sum()) for log in (log_q, log_p)]
        every, alike = np.concatenate(kl), np.concatenate(same)
        found.tokens = n = len(every)
        found.kl_mean, found.kl_standard_error = float(every.mean()), float(every.std() / n**0.5)
        found.top1 = float(alike.mean())
        found.top1_standard_error = float((found.top1 * (1 - found.top1) / n) ** 0.5)
        found.perplexity_ratio = float(np.exp((loss[0] - loss[1]) / max(n - len(kl), 1)))
        if n >= _ENOUGH:
            found.kl_percentiles = {str(q): float(np.percentile(every, q)) for q in (50, 90, 99, 99.9)}

    def _greedy(self, ids: list[int], count: int = 16) -> int:
        """How many tokens both choose alike after the same text."""
        given = np.array([ids], np.int64)
        (mine, state), (theirs, after) = self.graph.run(given), self.reference.run(given)
        for done in range(count):
            token = int(theirs[0, -1].argmax())
            if int((mine[0, -1] if mine.ndim == 3 else mine[0]).argmax()) != token:
                return done
            given = np.array([[token]], np.int64)
            (mine, state), (theirs, after) = self.graph.run(given, state), self.reference.run(given, after)
        return count

    def benchmark_inference_speed(self) -> float:
        """Milliseconds that onnxruntime takes for one token: the median of 32, after some to warm up."""
        state, taken = self.graph.create_state(1), []
        for _ in range(4 + _TIMED):
            start = time.perf_counter()
            _, state = self.graph.run([[0]], state)
            taken.append(time.perf_counter() - start)
        return float(np.median(taken[4:]) * 1000)

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
        on = f"on {found.tokens} tokens"
        return [
            error if gate.error is None else Check(error_name, worst, gate.error, worst <= gate.error),
            Check(f"mean KL in nats per token, {on}", found.kl_mean, gate.kl, found.kl_mean <= gate.kl),
            Check(f"share of likeliest tokens that stay, {on}", found.top1, gate.top1, found.top1 >= gate.top1),
        ]

    def generate_validation_report(self, path: Path, found: Comparison, checks: list[Check | NotApplicable]) -> None:
        """Write what was measured as JSON.

        Raises:
            OutputError: it cannot be written.
        """
        report = {
            "weights": self.graph.weights,
            "gate": asdict(self.gate),
            "measured": asdict(found),
            "checks": [str(check) for check in checks],
        }
        write_text(path, json.dumps(report, indent=1) + "\n", overwrite=True)

    def _random(self, shape: tuple[int, int]) -> np.ndarray:
        return np.random.default_rng(sum(shape)).integers(0, self.reference.vocab_size, shape)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error relative to the scale of what is expected; infinite where it is another shape or not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


def _same_likeliest(found: torch.Tensor, expected: torch.Tensor) -> np.ndarray:
    """Whether the likeliest token is the same, `[T]`; two that are equally likely but for rounding are the same."""
    chosen = expected.gather(-1, found.argmax(-1, keepdim=True))[:, 0]
    best = expected.max(-1).values
    return ((best - chosen) <= 1e-5 * best.abs().clamp_min(1)).numpy()
