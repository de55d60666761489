"""Proof of a merge: re-opens what was written with the formats' own libraries and recomputes it from the inputs.

Nothing of the merge is used here but its arguments: files are read by `torch.load` and `safetensors`, and the
arithmetic is written again, in float64, by each method's own proof.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.families import MERGE_METHODS
from rwkv_lab.merge.inputs import init_paths
from rwkv_lab.merge.plan import MergeResult
from rwkv_lab.merge.proof import Exact, Proof, ProofInputs, Source
from rwkv_lab.merge.proof_files import is_zip, model_and_tuned, read
from rwkv_lab.merge.spec import SVD

_ROWS = 1 << 20  # elements compared at a time


@checked
def verify_merge(result: MergeResult) -> list[Check]:
    """Compare the output of a merge with an independent recomputation, tensor by tensor.

    A tensor that should be a copy must equal its source bit for bit. A computed one must lie within half a unit in the
    last place of its dtype of the float64 result, plus the rounding that the stated precision allows.

    Raises:
        ParameterError: the result of a dry run, which wrote nothing.
    """
    if not result.outputs:
        raise ParameterError(f"{result.out} was not written: this is the result of a dry run")
    recipe, out = result.recipe, read(result.out)
    proof = MERGE_METHODS[recipe["method"]].proof(_proof_inputs(result))
    sources, found = proof.sources(), _Comparison()
    for name, source in sources.items():
        if name in out:
            found.add(name, out[name], source, proof, recipe["dtype"])
    zeros = _states_of_zeros(sources, proof, result.plan.layout.n_layer)
    for name in zeros.keys() & set(out):
        found.add_zeros(out[name], zeros[name], recipe["dtype"])
    known = [*sources, *zeros]
    missing, extra = [n for n in known if n not in out], [n for n in out if n not in known]
    checks = [
        Check("tensors missing from the re-opened output", len(missing), 0, not missing),
        Check("tensors in the output that belong there by no rule", len(extra), 0, not extra),
        *found.checks(recipe["allow_nonfinite"]),
    ]
    if is_zip(result.out):
        with zipfile.ZipFile(result.out) as archive:
            bad = archive.testzip()
        checks.append(Check("records of the zip whose checksum is wrong", bad or "none", "none", bad is None))
    return checks


def _states_of_zeros(sources: Mapping[str, Source | None], proof: Proof, n_layer: int) -> dict[str, torch.Tensor]:
    """The states that a merge has to write for layers without one: where it writes any, every layer has one."""
    states = {n: s for n, s in sources.items() if n.endswith(".att.time_state")}
    written = [(n, s) for n, s in states.items() if s is None or s[0] is not proof.inputs.base or s[1] != n]
    if not written or len(states) == len(sources):  # the output is a state, and no model
        return {}
    name, source = written[0]
    like = proof.like(name) if source is None else source[0][source[1]]
    names = [f"blocks.{i}.att.time_state" for i in range(n_layer)]
    return {n: torch.zeros_like(like) for n in names if n not in states}


def _proof_inputs(result: MergeResult) -> ProofInputs:
    init = init_paths(result.plan.spec.pissa_init, len(result.tuned))
    names = result.recipe["parameters"].get("adapter")
    base, tuned = model_and_tuned(result.base, result.tuned, names)
    return ProofInputs(
        base, tuned, result.tuned, [None if path in (None, SVD) else read(path) for path in init], result.recipe
    )


@dataclass
class _Comparison:
    """What was found, tensor by tensor."""

    copied: int = 0
    copied_wrong: int = 0
    computed: int = 0
    not_finite: int = 0
    other_shape: int = 0
    worst: float = 0.0  # error of a computed tensor, in units of what is allowed
    worst_name: str = ""

    def add(self, name: str, found: torch.Tensor, source: Source | None, proof: Proof, dtype: str | None) -> None:
        copied, like = None if source is None else source[0][source[1]], proof.like(name)
        # What is copied keeps its own dtype, what is computed the base's.
        kept = like if copied is None else copied
        wanted = getattr(torch, dtype or str(kept.dtype).removeprefix("torch."))
        if found.shape != like.shape or copied is None and found.dtype != wanted:
            self.other_shape += 1
        elif copied is not None and not _rounds_twice(copied, dtype):
            self.copied += 1
            self.copied_wrong += not _same_bits(found, copied.to(wanted))
        else:
            self.computed += 1
            error = _worst(found, proof.exact(name) if copied is None else _exact_copy(copied))
            if error > self.worst:
                self.worst, self.worst_name = error, name
        self.not_finite += int(found.numel() - torch.isfinite(found).sum())

    def add_zeros(self, found: torch.Tensor, zeros: torch.Tensor, dtype: str | None) -> None:
        wanted = getattr(torch, dtype) if dtype else zeros.dtype
        self.copied += 1
        self.copied_wrong += not _same_bits(found, zeros.to(wanted))
        self.other_shape += found.shape != zeros.shape

    def checks(self, allow_nonfinite: bool) -> list[Check]:
        checks = [
            Check(
                f"copied tensors that differ from their source in any bit, of {self.copied}",
                self.copied_wrong,
                0,
                self.copied_wrong == 0,
            ),
            Check("tensors of another shape or dtype than asked for", self.other_shape, 0, self.other_shape == 0),
            Check(
                "values in the output that are NaN or Inf",
                self.not_finite,
                "any: allow_nonfinite" if allow_nonfinite else 0,
                allow_nonfinite or self.not_finite == 0,
            ),
        ]
        if self.computed:
            where = f" ({self.worst_name})" if self.worst_name else ""
            name = f"largest error of {self.computed} computed tensors, in units of what one rounding allows{where}"
            checks.append(Check(name, round(self.worst, 4), 1, self.worst <= 1))
        return checks


def _exact_copy(copied: torch.Tensor) -> Exact:
    return lambda part: ([copied.reshape(-1)[part].double()], 0.0)


def _rounds_twice(source: torch.Tensor, dtype: str | None) -> bool:
    """torch takes float64 to a 16-bit format by way of float32, which is no reference: error bounds must do."""
    return source.dtype == torch.float64 and dtype in ("bfloat16", "float16")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = a.reshape(-1).view(bits), b.reshape(-1).view(bits)
    return all(torch.equal(x, y) for x, y in zip(a.split(_ROWS), b.split(_ROWS), strict=True))


def _worst(out: torch.Tensor, exact: Exact) -> float:
    """Largest |out - exact| over what is allowed: half a unit of its dtype, and the arithmetic's error."""
    unit, tiny = torch.finfo(out.dtype).eps / 2, torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    out, worst = out.reshape(-1), 0.0
    for start in range(0, len(out), _ROWS):
        part = slice(start, min(start + _ROWS, len(out)))
        found, (wanted, arithmetic) = out[part].double(), exact(part)
        errors = [(found - w).abs() / (unit * w.abs() + arithmetic * (1 + unit) + tiny) for w in wanted]
        same = [(found == _held(w, out.dtype)) | (found.isnan() & w.isnan()) for w in wanted]  # Inf - Inf is NaN
        errors = [torch.where(s, 0, e).nan_to_num(nan=float("inf")) for s, e in zip(same, errors, strict=True)]
        nearest = torch.stack(errors).amin(0)
        worst = max(worst, float(nearest.max()))
    return worst


def _held(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64, in which what is too large for a dtype is Inf, as it is there."""
    return torch.where(values.abs() > torch.finfo(dtype).max, values * float("inf"), values)
