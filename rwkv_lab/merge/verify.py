"""Proof of a merge: re-opens what was written with the formats' own libraries and recomputes it from the inputs.

Nothing of the merge is used here but its arguments: files are read by `torch.load` and `safetensors`, and the
arithmetic is written again, in float64.
"""

import zipfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import safe_open

from rwkv_lab.checks import Check
from rwkv_lab.merge.plan import MergeResult

_ROWS = 1 << 20  # elements compared at a time


def verify_merge(result: MergeResult) -> list[Check]:
    """Compare the output of a merge with an independent recomputation, tensor by tensor.

    A tensor that should be a copy must equal its source bit for bit. A computed one must lie within half a unit in the
    last place of its dtype of the float64 result, plus the rounding that the stated precision allows.
    """
    base, tuned, out = _read(result.base), _read(result.tuned), _read(result.out)
    recipe = result.recipe
    expected = dict.fromkeys(base)
    counts = {"copied": 0, "copied wrong": 0, "computed": 0, "not finite": 0}
    worst, worst_name = 0.0, ""
    touched = _touched(base, tuned, recipe)
    expected |= dict.fromkeys(touched)
    for name in expected:
        if name not in out:
            continue
        exact = _same_bits if _is_copy(name, base, tuned, touched, recipe) else None
        if exact:
            source = tuned[name] if name in touched else base[name]
            wanted = source if recipe["dtype"] is None else source.to(getattr(torch, recipe["dtype"]))
            counts["copied"] += 1
            counts["copied wrong"] += not exact(out[name], wanted)
        else:
            counts["computed"] += 1
            error = _error_in_bounds(name, base, tuned, out[name], recipe)
            if error > worst:
                worst, worst_name = error, name
        counts["not finite"] += int(out[name].numel() - torch.isfinite(out[name]).sum())
    missing, extra = [n for n in expected if n not in out], [n for n in out if n not in expected]
    checks = [
        Check("tensors missing from the re-opened output", len(missing), 0, not missing),
        Check("tensors in the output that belong there by no rule", len(extra), 0, not extra),
        Check(
            f"copied tensors that differ from their source in any bit, of {counts['copied']}",
            counts["copied wrong"],
            0,
            counts["copied wrong"] == 0,
        ),
        Check("values in the output that are NaN or Inf", counts["not finite"], 0, counts["not finite"] == 0),
    ]
    if counts["computed"]:
        where = f" ({worst_name})" if worst_name else ""
        name = f"largest error of {counts['computed']} computed tensors, in units of what one rounding allows{where}"
        checks.append(Check(name, round(worst, 4), 1, worst <= 1))
    if zipfile.is_zipfile(result.out):
        with zipfile.ZipFile(result.out) as archive:
            bad = archive.testzip()
        checks.append(Check("records of the zip whose checksum is wrong", bad or "none", "none", bad is None))
    return checks


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a checkpoint, mapped and not read, by the format's own library."""
    if path.is_dir():
        found: dict[str, torch.Tensor] = {}
        for file in sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")):
            found |= _read(file)
        return found
    if zipfile.is_zipfile(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {n: t.detach() for n, t in loaded.items() if isinstance(t, torch.Tensor)}
    with safe_open(path, "pt") as f:
        return {n: f.get_tensor(n) for n in f.keys()}


def _touched(base: Mapping, tuned: Mapping, recipe: dict) -> set[str]:
    """Names of the output that the recipe lets the tuned file change."""
    if recipe["alpha"] == 0:
        return set()
    names = {n for n in tuned if not n.endswith((".lora_A", ".lora_B"))}
    if recipe["method"] == "state":
        names = {n for n in names if n.endswith(".time_state")}
    if recipe["method"] == "lora":
        names |= {n.removesuffix(".lora_A") + ".weight" for n in tuned if n.endswith(".lora_A")}
    include, exclude = recipe["include"], recipe["exclude"] or []
    return {
        n
        for n in names
        if (include is None or any(fnmatchcase(n, p) for p in include)) and not any(fnmatchcase(n, p) for p in exclude)
    }


def _is_copy(name: str, base: Mapping, tuned: Mapping, touched: set[str], recipe: dict) -> bool:
    if name not in touched:
        return True
    if recipe["method"] == "lora":
        return name in tuned
    return recipe["alpha"] is None or recipe["alpha"] == 1


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = a.reshape(-1).view(bits), b.reshape(-1).view(bits)
    return all(torch.equal(x, y) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True))


def _error_in_bounds(name: str, base: Mapping, tuned: Mapping, out: torch.Tensor, recipe: dict) -> float:
    """Largest |out - exact| over what rounding allows: half a unit of its dtype, and the arithmetic's error."""
    alpha = recipe["alpha"]
    stem = name.removesuffix(".weight")
    eps = torch.finfo(getattr(torch, recipe["precision"])).eps
    unit, tiny = torch.finfo(out.dtype).eps / 2, torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    if recipe["method"] == "lora":
        a, b = tuned[f"{stem}.lora_A"].double(), tuned[f"{stem}.lora_B"].double()
        scale, width, terms = alpha / a.shape[0], a.shape[1], a.shape[0] + 2
        weight = base[name]
    else:
        t = tuned[name]
        weight = base[name].reshape(t.shape) if name in base else torch.zeros_like(t)
        width, terms = max(t.shape[-1], 1), 4
        weight, out = weight.reshape(-1, width), out.reshape(-1, width)
        t = t.reshape(-1, width)
    rows, worst = max(_ROWS // width, 1), 0.0
    for i in range(0, weight.shape[0], rows):
        w = weight[i : i + rows].double()
        if recipe["method"] == "lora":
            exact = w + scale * (b[i : i + rows] @ a)
            size = w.abs() + abs(scale) * (b[i : i + rows].abs() @ a.abs())
        else:
            exact = w + alpha * (t[i : i + rows].double() - w)
            size = w.abs() + t[i : i + rows].double().abs()
        allowed = unit * exact.abs() + terms * eps * size * (1 + unit) + tiny
        worst = max(worst, float(((out[i : i + rows].double() - exact).abs() / allowed).max()))
    return worst
