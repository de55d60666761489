"""Proof of a merge: re-opens what was written with the formats' own libraries and recomputes it from the inputs.

Nothing of the merge is used here but its arguments: files are read by `torch.load` and `safetensors`, and the
arithmetic is written again, in float64.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import safe_open

from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.plan import MergeResult

_ROWS = 1 << 20  # elements compared at a time


def verify_merge(result: MergeResult) -> list[Check]:
    """Compare the output of a merge with an independent recomputation, tensor by tensor.

    A tensor that should be a copy must equal its source bit for bit. A computed one must lie within half a unit in the
    last place of its dtype of the float64 result, plus the rounding that the stated precision allows.

    Raises:
        ParameterError: the result of a dry run, which wrote nothing.
    """
    if not result.outputs:
        raise ParameterError(f"{result.out} was not written: this is the result of a dry run")
    base, tuned, out = _read(result.base), _read(result.tuned), _read(result.out)
    recipe = result.recipe
    expected = dict.fromkeys(base)
    counts = {"copied": 0, "copied wrong": 0, "computed": 0, "not finite": 0, "other shape": 0}
    worst, worst_name = 0.0, ""
    touched = _touched(base, tuned, recipe)
    expected |= dict.fromkeys(touched)
    for name in expected:
        if name not in out:
            continue
        found, copied = out[name], _is_copy(name, tuned, touched, recipe)
        origin = base[name] if name in base else tuned[name]
        asked = getattr(torch, recipe["dtype"] or str(origin.dtype).removeprefix("torch."))
        if found.shape != origin.shape or not copied and found.dtype != asked:
            counts["other shape"] += 1
        elif copied and not _rounds_twice(source := tuned[name] if name in touched else origin, recipe["dtype"]):
            wanted = source if recipe["dtype"] is None else source.to(getattr(torch, recipe["dtype"]))
            counts["copied"] += 1
            counts["copied wrong"] += not _same_bits(found, wanted)
        else:
            counts["computed"] += 1
            rules = recipe | {"method": "overlay", "alpha": float(name in touched)} if copied else recipe
            error = _error_in_bounds(name, base, tuned, found, rules)
            if error > worst:
                worst, worst_name = error, name
        counts["not finite"] += int(found.numel() - torch.isfinite(found).sum())
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
        Check("tensors of another shape or dtype than asked for", counts["other shape"], 0, counts["other shape"] == 0),
        Check(
            "values in the output that are NaN or Inf",
            counts["not finite"],
            "any: allow_nonfinite" if recipe["allow_nonfinite"] else 0,
            recipe["allow_nonfinite"] or counts["not finite"] == 0,
        ),
    ]
    if counts["computed"]:
        where = f" ({worst_name})" if worst_name else ""
        name = f"largest error of {counts['computed']} computed tensors, in units of what one rounding allows{where}"
        checks.append(Check(name, round(worst, 4), 1, worst <= 1))
    if _is_zip(result.out):
        with zipfile.ZipFile(result.out) as archive:
            bad = archive.testzip()
        checks.append(Check("records of the zip whose checksum is wrong", bad or "none", "none", bad is None))
    return checks


class _Safetensors(Mapping):
    """The tensors of .safetensors files, each read when it is asked for."""

    def __init__(self, files: list[Path]):
        self.home = {}
        for file in files:
            opened = safe_open(file, "pt")
            self.home |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.home[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)

    def __contains__(self, name: object) -> bool:
        return name in self.home


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint, by the format's own library: mapped or read one by one, never all in memory."""
    files = _files_of(path)
    if not _is_zip(files[0]):
        return _Safetensors(files)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":  # which torch takes for its word, unless it does not see the name
            with open(file, "rb") as f:
                loaded = torch.load(f, map_location="cpu", weights_only=True)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found |= {n: t.detach() for n, t in loaded.items() if isinstance(t, torch.Tensor)}
    return found


def _files_of(path: Path) -> list[Path]:
    """The file itself, or those of a Hugging Face folder."""
    if not path.is_dir():
        return [path]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            return [path / shard for shard in dict.fromkeys(json.loads(index.read_bytes())["weight_map"].values())]
    return [next(f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file())]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"PK\3\4"


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


def _is_copy(name: str, tuned: Mapping, touched: set[str], recipe: dict) -> bool:
    if name not in touched:
        return True
    if recipe["method"] == "lora":
        return name in tuned
    return recipe["alpha"] == 1


def _rounds_twice(source: torch.Tensor, dtype: str | None) -> bool:
    """torch takes float64 to a 16-bit format by way of float32, which is no reference: error bounds must do."""
    return source.dtype == torch.float64 and dtype in ("bfloat16", "float16")


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
        t = tuned[name].reshape(-1, 1) if alpha else torch.zeros(out.numel(), 1)
        weight = base[name].reshape(-1, 1) if name in base else torch.zeros_like(t)
        width, terms, out = 1, 4, out.reshape(-1, 1)
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
        error = (out[i : i + rows].double() - exact).abs() / allowed
        worst = max(worst, float(error.nan_to_num(nan=float("inf")).max()))
    return worst
