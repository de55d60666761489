"""The arithmetic of the mixing methods once more, for the proof: in float64, from the recipe alone, by other ways.

Nothing of `mixing`, `mix`, `settings`, `draws` or `stack` is used here. Where a method sorts out values, this sorts or
selects whole tensors: the proof may take the memory that the merge does not.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from hashlib import sha256

import numpy as np
import torch

MIXED = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock")

# For a part of a flat tensor: what may stand there (several where a sum too near 0 to have a sign decides), and what
# the arithmetic may add to the error of the last rounding.
Exact = Callable[[slice], tuple[list[torch.Tensor], torch.Tensor | float]]


def mixed_names(base: Mapping, tuned: list[Mapping], recipe: dict) -> list[str]:
    """Names of the output that are computed: what some tuned model has and alpha lets it touch."""
    unused = [f"blocks.0.att.v{i}" for i in range(3)]
    names = dict.fromkeys(n for t in tuned for n in t if n in base or n not in unused)
    return [n for n in names if recipe["alpha"] is None or _value(recipe["alpha"], n, _layers(base)) != 0]


def exact_mix(name: str, base: Mapping, tuned: list[Mapping], recipe: dict) -> Exact:
    flat = [t[name].reshape(-1) if name in t else None for t in (base, *tuned)]
    if flat[0] is None:
        flat[0] = torch.zeros_like(next(t for t in flat if t is not None))
    flat = [flat[0] if t is None else t for t in flat]
    settings = {"alpha": recipe["alpha"], "weights": recipe["weights"], **recipe["parameters"]}
    p = {k: _value(s, name, _layers(base)) for k, s in settings.items()}
    precision = getattr(torch, recipe["precision"])
    eps = torch.finfo(precision).eps * (4 + 2 * len(flat))
    if recipe["method"] in ("linear", "slerp", "model_stock"):
        # Angles are between the values that the recipe's precision sees: those of small deltas depend on it.
        return _combined(flat, _shares(recipe["method"], [t.to(precision) for t in flat], p), eps)
    kept = [None] * len(tuned)
    density = p.get("density", 1.0)
    density = density if isinstance(density, list) else [density] * len(tuned)
    if recipe["method"] == "ties":
        kept = [_largest(flat[0], t, d, recipe["precision"]) for t, d in zip(flat[1:], density, strict=True)]
    scale = [1.0] * len(tuned)
    if recipe["method"].startswith("dare"):
        kept = [_drawn(p["seed"], m, name, len(flat[0]), d) for m, d in enumerate(density)]
        scale = [1 / d if p["rescale"] and d else 1.0 for d in density]
    w = p["weights"] if isinstance(p["weights"], list) else [p["weights"]] * len(tuned)
    return _added(flat, kept, scale, w, p["alpha"], p["normalize"], recipe["method"].endswith("ties"), eps)


def stacked(base: Mapping, tuned: list[Mapping], layers: list[str]) -> dict[str, tuple[Mapping, str]]:
    """Name of the output -> (file, name in it), for layers such as "tuned2[3:5]"."""
    files, order = [base, *tuned], []
    for run in layers:
        who, first, last = re.split(r"[\[:\]]", run.replace(" ", ""))[:3]
        which = 0 if who == "base" else int(who.removeprefix("tuned") or 1)
        order += [(files[which], i) for i in range(int(first), int(last))]
    out = {}
    for place, (file, i) in enumerate(order):
        for n in file:
            prefix = f"blocks.{i}."
            if n.startswith(prefix) and not (place and ".ln0." in n):
                out[f"blocks.{place}.{n[len(prefix) :]}"] = (file, n)
    out |= {n: (order[0][0], n) for n in order[0][0] if n == "emb.weight"}
    return out | {n: (order[-1][0], n) for n in order[-1][0] if n.split(".")[0] in ("ln_out", "head")}


def pattern_matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern matches any run of the name's dotted parts, which are tried one by one."""
    parts = name.split(".")
    runs = [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(re.fullmatch(fnmatch.translate(pattern), run) for run in runs)


def _layers(base: Mapping) -> int:
    return 1 + max(int(n.split(".")[1]) for n in base if n.startswith("blocks."))


def _value(setting: object, name: str, layers: int) -> object:
    if isinstance(setting, list):
        return [_value(s, name, layers) for s in setting]
    if not isinstance(setting, dict):
        return setting
    if list(setting) == ["gradient"]:
        at = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        where = (at / (layers - 1) if layers > 1 else 1.0) if name.startswith("blocks.") else 0.0
        points = setting["gradient"]
        return float(np.interp(where, np.linspace(0, 1, len(points)), points)) if len(points) > 1 else points[0]
    fitting = [s for p, s in setting.items() if pattern_matches(name, p)]
    return _value(fitting[0], name, layers)


def _shares(method: str, flat: list[torch.Tensor], p: dict) -> list[float]:
    """What each model is multiplied with."""
    if method == "linear":
        w = p["weights"] if isinstance(p["weights"], list) else [1 - p["weights"], p["weights"]]
        return [x / math.fsum(w) for x in w] if p["normalize"] else w
    if method == "slerp":
        angle, t = _angle(*flat), p["alpha"]
        if angle is None or abs(math.cos(angle)) > 0.9995:
            return [1 - t, t]
        return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    deltas = [t.double() - flat[0].double() for t in flat[1:]]
    n, cosines = len(deltas), []
    for i in range(n):
        for j in range(i):
            size = float(deltas[i].norm()) * float(deltas[j].norm())
            cosines.append(float(deltas[i].dot(deltas[j])) / size if size else 0.0)
    c = math.fsum(cosines) / len(cosines)
    # Between base and mean; as the deltas cancel the formula goes to minus infinity, whose nearest is the base.
    t = float(np.clip(n * c / max(1 + (n - 1) * c, 1e-12), 0, 1))
    return [1 - t] + [t / n] * n


def _angle(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Between two vectors, by the sides of their rhombus."""
    a, b = a.double(), b.double()
    if not float(a.norm()) or not float(b.norm()):
        return None
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


def _combined(flat: list[torch.Tensor], shares: list[float], eps: float) -> Exact:
    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        terms = [t[part].double() * s for t, s in zip(flat, shares, strict=True) if s]
        # lerp forms a difference of the two, so the size of each counts whole.
        size = sum(
            t[part].double().abs() * max(abs(s), min(1.0, max(map(abs, shares))))
            for t, s in zip(flat, shares, strict=True)
        )
        return [sum(terms) if terms else torch.zeros_like(size)], eps * size

    return exact


def _largest(base: torch.Tensor, tuned: torch.Tensor, density: float, precision: str) -> torch.Tensor:
    """Mask of the values of the delta that are at least as large as its k-th largest; magnitudes are of float32."""
    dtype = getattr(torch, precision)
    size = (tuned.to(dtype) - base.to(dtype)).abs().float()
    if density == 0:
        return torch.zeros_like(size, dtype=torch.bool)
    k = max(int(density * len(size)), 1)
    return size >= torch.kthvalue(size, len(size) - k + 1).values


def _drawn(seed: int, model: int, name: str, count: int, density: float) -> torch.Tensor:
    """Mask of what a random choice of that density keeps: the stream of 32-bit words from its beginning."""
    key = np.frombuffer(sha256(f"{seed}/{model}/{name}".encode()).digest()[:16], "<u8")
    words = np.random.Philox(key=key).random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
    return torch.from_numpy(words < density * 2.0**32)


def _added(
    flat: list[torch.Tensor],
    kept: list[torch.Tensor | None],
    scale: list[float],
    weights: list[float],
    alpha: float,
    normalize: bool,
    by_sign: bool,
    eps: float,
) -> Exact:
    def exact(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        b = flat[0][part].double()
        deltas, sizes = [], []
        for t, mask, s, w in zip(flat[1:], kept, scale, weights, strict=True):
            t = t[part].double()
            keep = 1.0 if mask is None else mask[part].double()
            deltas.append((t - b) * keep * s * w)
            sizes.append((t.abs() + b.abs()) * keep * abs(s * w))
        total, size = sum(deltas), sum(sizes)
        if not by_sign:
            divisor = math.fsum(weights) if normalize else 1.0
            return [b + alpha * total / divisor], eps * (b.abs() + abs(alpha / divisor) * size)
        answers, allowed = [], torch.zeros_like(b)
        for positive in (True, False):
            agree = [(d > 0 if positive else d < 0).double() for d in deltas]
            divisor = sum(a * w for a, w in zip(agree, weights, strict=True))
            magnitude = sum(a * abs(w) for a, w in zip(agree, weights, strict=True))
            cancels = divisor.abs() <= 1e-6 * magnitude  # what rounding left, or none agrees: a sum, and no mean
            divisor = divisor.masked_fill(cancels, 1.0) if normalize else torch.ones_like(b)
            answers.append(b + alpha * sum(d * a for d, a in zip(deltas, agree, strict=True)) / divisor)
            allowed = torch.maximum(allowed, eps * (b.abs() + abs(alpha) * size / divisor.abs()))
        # Rounded deltas may add up to the other sign.
        one, other = (torch.where(total >= 0, x, y) for x, y in (answers, answers[::-1]))
        return [one, torch.where(total.abs() <= eps * size, other, one)], allowed

    return exact
