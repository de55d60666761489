"""Proof of a merge: re-opens what was written with the formats' own libraries and recomputes it from the inputs.

Nothing of the merge is used here but its arguments: files are read by `torch.load` and `safetensors`, and the
arithmetic is written again, in float64.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.plan import MergeResult
from rwkv_lab.merge.verify_adapter import ADAPTED, Understood, adapted_names, exact_adapted, read_adapter, understand
from rwkv_lab.merge.verify_mix import MIXED, Exact, exact_mix, mixed_names, pattern_matches, stacked

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
    recipe = result.recipe
    base, out, adapters = _read(result.base), _read(result.out), []
    if recipe["method"] in ADAPTED:
        for i, path in enumerate(result.tuned):
            init = result.pissa_init[i]
            adapters.append(understand(i, path, _read(path), None if init is None else _read(init), recipe))
        tuned = [a.whole for a in adapters]
    else:
        tuned = [_read(p) for p in result.tuned]
    counts = {"copied": 0, "copied wrong": 0, "computed": 0, "not finite": 0, "other shape": 0}
    worst, worst_name = 0.0, ""
    expected = _expected(base, tuned, adapters, recipe)
    for name, source in expected.items():
        if name not in out:
            continue
        found = out[name]
        copied = None if source is None else source[0][source[1]]
        origin = base[name] if name in base and recipe["method"] != "passthrough" else copied
        if origin is None:
            origin = next(t[name] for t in tuned if name in t)
        # What is copied keeps its own dtype, what is computed the base's.
        kept = origin if copied is None else copied
        asked = getattr(torch, recipe["dtype"] or str(kept.dtype).removeprefix("torch."))
        if found.shape != origin.shape or copied is None and found.dtype != asked:
            counts["other shape"] += 1
        elif copied is not None and not _rounds_twice(copied, recipe["dtype"]):
            counts["copied"] += 1
            counts["copied wrong"] += not _same_bits(found, copied.to(asked))
        else:
            counts["computed"] += 1
            if copied is not None:
                error = _worst(found, lambda part, c=copied: ([c.reshape(-1)[part].double()], 0.0))
            elif adapters:
                error = _worst(found, exact_adapted(name, base, adapters, recipe))
            elif recipe["method"] in MIXED:
                error = _worst(found, exact_mix(name, base, tuned, recipe))
            else:
                error = _worst(found, _exact(name, base, tuned[0], recipe))
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
    if not path.is_dir() or (path / "adapter_config.json").is_file():
        return read_adapter(path)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{stem}.index.json"
        if index.is_file():
            return [path / shard for shard in dict.fromkeys(json.loads(index.read_bytes())["weight_map"].values())]
    return [next(f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file())]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"PK\3\4"


def _expected(
    base: Mapping, tuned: list[Mapping], adapters: list[Understood], recipe: dict
) -> dict[str, tuple[Mapping, str] | None]:
    """For every name of the output: (file, name in it) of what it is a copy of, or None where it is computed."""
    if recipe["method"] == "passthrough":
        return stacked(base, tuned, recipe["parameters"]["layers"])
    out: dict[str, tuple[Mapping, str] | None] = {name: (base, name) for name in base}
    include, exclude = recipe["include"], recipe["exclude"] or []

    def chosen(name: str) -> bool:
        wanted = include is None or any(pattern_matches(name, p) for p in include)
        return wanted and not any(pattern_matches(name, p) for p in exclude)

    if recipe["method"] in MIXED:
        return out | {n: None for n in mixed_names(base, tuned, recipe) if chosen(n)}
    if recipe["alpha"] == 0:
        return out
    if adapters:
        given = {n: (a.whole, n) for a in adapters if a.weight == 1 for n in a.whole}
        return out | {n: given.get(n) for n in adapted_names(base, adapters, recipe) if chosen(n)}
    (whole,) = tuned
    names = {n for n in whole if recipe["method"] != "state" or n.endswith(".time_state")}
    return out | {n: (whole, n) if recipe["alpha"] == 1 else None for n in names if chosen(n)}


def _rounds_twice(source: torch.Tensor, dtype: str | None) -> bool:
    """torch takes float64 to a 16-bit format by way of float32, which is no reference: error bounds must do."""
    return source.dtype == torch.float64 and dtype in ("bfloat16", "float16")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = a.reshape(-1).view(bits), b.reshape(-1).view(bits)
    return all(torch.equal(x, y) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True))


def _exact(name: str, base: Mapping, tuned: Mapping, recipe: dict) -> Exact:
    """A share of the way from base to tuned."""
    alpha, eps = recipe["alpha"], torch.finfo(getattr(torch, recipe["precision"])).eps
    t = tuned[name].reshape(-1)
    weight = base[name].reshape(-1) if name in base else torch.zeros_like(t)

    def blend(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
        w, to = weight[part].double(), t[part].double()
        return [w + alpha * (to - w)], 4 * eps * (w.abs() + to.abs())

    return blend


def _worst(out: torch.Tensor, exact: Exact) -> float:
    """Largest |out - exact| over what is allowed: half a unit of its dtype, and the arithmetic's error."""
    unit, tiny = torch.finfo(out.dtype).eps / 2, torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    out, worst = out.reshape(-1), 0.0
    for start in range(0, len(out), _ROWS):
        part = slice(start, min(start + _ROWS, len(out)))
        found, (wanted, arithmetic) = out[part].double(), exact(part)
        errors = [(found - w).abs() / (unit * w.abs() + arithmetic * (1 + unit) + tiny) for w in wanted]
        nearest = torch.stack([e.nan_to_num(nan=float("inf")) for e in errors]).amin(0)
        worst = max(worst, float(nearest.max()))
    return worst
