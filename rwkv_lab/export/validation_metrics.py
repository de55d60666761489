"""How far an exported model is from the model: errors of arrays, and of predictions of the next token."""

from dataclasses import dataclass, field

import numpy as np

ENOUGH = 100  # tokens below which percentiles mean nothing
_VALUES = 2**20  # of two arrays at a time, likewise
_ROWS = 16  # positions at a time: a whole text in float64 would be large
_TIE = 1e-5  # relative to the larger logit: tokens closer than that are equally likely but for rounding


@dataclass(frozen=True)
class ArrayError:
    """An array beside the one that was expected; `relative` and `mean` are in units of its scale.

    scale: the largest magnitude that was expected, at least 1.
    relative: largest error; infinite where the shape is another one or a value is not finite.
    mean: mean magnitude of the error.
    cosine: of the angle between both, as vectors.
    not_finite: how many values are NaN or infinite.
    """

    scale: float
    relative: float
    mean: float
    cosine: float
    not_finite: int


def array_error(found: np.ndarray, expected: np.ndarray) -> ArrayError:
    """Compare two arrays of float32."""
    scale = max(1.0, float(expected.max(initial=0)), -float(expected.min(initial=0)))
    bad = int((~np.isfinite(found)).sum())
    if found.shape != expected.shape or bad:
        return ArrayError(scale, float("inf"), float("inf"), float("nan"), bad)
    a, b = np.ravel(found), np.ravel(expected)
    largest = total = product = of_a = of_b = 0.0
    for at in range(0, a.size, _VALUES):
        x, y = a[at : at + _VALUES].astype(np.float64), b[at : at + _VALUES].astype(np.float64)
        difference = np.abs(x - y)
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        product, of_a, of_b = product + float(x @ y), of_a + float(x @ x), of_b + float(y @ y)
    sizes = (of_a * of_b) ** 0.5
    cosine = product / sizes if sizes else float(np.array_equal(a, b))
    return ArrayError(scale, largest / scale, total / max(a.size, 1) / scale, cosine, 0)


@dataclass
class Predictions:
    """What next tokens were predicted on a text, by the exported model beside the model.

    KL is the Kullback-Leibler divergence from the model's distribution, in nats per token. s.e. is a standard error.
    """

    tokens: int = 0
    kl_mean: float = float("nan")
    kl_standard_error: float = float("nan")
    kl_percentiles: dict[str, float] = field(default_factory=dict)  # empty below 100 tokens
    kl_largest: float = float("nan")
    top1: float = float("nan")  # share of positions whose likeliest token is the same
    top1_standard_error: float = float("nan")
    following: int = 0  # tokens whose probability was compared: each but the first of a text
    perplexity: float = float("nan")  # of the model, on these
    perplexity_ratio: float = float("nan")  # of the exported model to the model
    perplexity_ratio_standard_error: float = float("nan")
    log_probability_correlation: float = float("nan")
    probability_error_rms: float = float("nan")  # of what they give to the token that follows


class PredictionErrors:
    """Collects positions of texts, in pieces."""

    def __init__(self) -> None:
        self._kl, self._same, self._log_q, self._log_p = ([] for _ in range(4))

    def add(self, found: np.ndarray, expected: np.ndarray, following: np.ndarray) -> None:
        """Add logits `[T,V]`, and the tokens that follow: `[T]`, or `[T-1]` where the text ends."""
        for at in range(0, len(found), _ROWS):
            q, p = (_log_softmax(x[at : at + _ROWS].astype(np.float64)) for x in (found, expected))
            self._kl.append(np.maximum((np.exp(p) * (p - q)).sum(-1), 0))
            self._same.append(_same_likeliest(found[at : at + _ROWS], expected[at : at + _ROWS]))
            ids = following[at : at + _ROWS]
            self._log_q.append(q[np.arange(len(ids)), ids])
            self._log_p.append(p[np.arange(len(ids)), ids])

    def result(self) -> Predictions:
        """What was found so far."""
        kl, same, log_q, log_p = map(np.concatenate, (self._kl, self._same, self._log_q, self._log_p))
        n, off = len(kl), log_p - log_q
        top1 = float(same.mean())
        found = Predictions(n, float(kl.mean()), _standard_error(kl), {}, float(kl.max()), top1)
        found.top1_standard_error = (top1 * (1 - top1) / n) ** 0.5
        if n >= ENOUGH:
            found.kl_percentiles = {str(q): float(np.percentile(kl, q)) for q in (50, 90, 95, 99, 99.9)}
        if len(off):
            found.following, found.perplexity = len(off), float(np.exp(-log_p.mean()))
            found.perplexity_ratio = float(np.exp(off.mean()))
            found.perplexity_ratio_standard_error = found.perplexity_ratio * _standard_error(off)
            found.probability_error_rms = float(np.sqrt(np.square(np.exp(log_q) - np.exp(log_p)).mean()))
        if len(off) >= ENOUGH and log_p.std() and log_q.std():
            found.log_probability_correlation = float(np.corrcoef(log_q, log_p)[0, 1])
        return found


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")


def _same_likeliest(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Whether the likeliest token is the same, `[T]`; two that are equally likely but for rounding are the same."""
    chosen = np.take_along_axis(expected, found.argmax(-1)[:, None], -1)[:, 0]
    best = expected.max(-1)
    return best - chosen <= _TIE * np.maximum(np.abs(best), 1)
