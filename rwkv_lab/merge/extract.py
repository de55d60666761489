"""The reverse of merging a LoRA: from a base and a fine-tune of it, an adapter that brings one near the other.

Every matrix of the layers that changed becomes a pair in the layout that `lora` reads, from the singular value
decomposition of its delta; every other tensor that changed is carried whole. The alpha to merge the adapter with (its
largest rank) stands in the file, as that of an adapter trained here: merging needs none, and refuses another.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo, file_facts, open_checkpoint, write_text
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.output_checks import check_free_space
from rwkv_lab.checkpoint.packed import refuse_packed
from rwkv_lab.checkpoint.provenance import RECORD, as_text, downloaded, provenance, provenance_path, text_beside
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.changed_tensors import in_step
from rwkv_lab.merge.input_checks import (
    check_base,
    check_dtypes,
    check_full_tensors,
    refuse_other_dimensions,
    refuse_same_file,
)
from rwkv_lab.merge.output_checks import check_merge_output
from rwkv_lab.merge.spec import ExtractSpec, MergeOptions
from rwkv_lab.names import is_block_matrix
from rwkv_lab.paths import to_path
from rwkv_lab.patterns import is_selected, refuse_unmatched
from rwkv_lab.peft.kinds.lora import lora_note
from rwkv_lab.peft.rwkv_peft_layout import NOTE
from rwkv_lab.progress import Progress

log = logging.getLogger(__name__)

AnyPath = str | os.PathLike[str]
HEAD = "head.weight"
_EXACT_BELOW = 512  # the smaller side of a matrix: its whole decomposition takes less than a second
_MORE, _ROUNDS = 16, 4  # directions beyond the rank, and power iterations, of the randomised decomposition


@dataclass(frozen=True)
class Extracted:
    """One matrix and what its pair keeps of the delta."""

    name: str  # of the weight in the base
    rank: int
    energy: float  # share of ‖Δ‖² in the singular values that are kept; 1 at full rank
    error: float  # ‖Δ - alpha/r · B A‖ / ‖Δ‖, of the pair as it is stored
    norm: float  # ‖Δ‖, Frobenius


@dataclass(frozen=True)
class Pair:
    """Of one matrix, with Δ near B A."""

    A: torch.Tensor  # [r, in]
    B: torch.Tensor  # [out, r]
    kept: Extracted


@dataclass(frozen=True)
class ExtractResult:
    base: Path
    tuned: Path
    out: Path
    alpha: float  # to merge the adapter with: it stands in the file
    matrices: tuple[Extracted, ...]
    whole: tuple[str, ...]  # tensors that changed and are carried as they are
    outputs: tuple[FileFacts, ...]

    @property
    def error(self) -> float:
        """‖Δ - alpha/r · B A‖ / ‖Δ‖ over all matrices together."""
        total = math.fsum(m.norm**2 for m in self.matrices)
        return math.sqrt(math.fsum((m.error * m.norm) ** 2 for m in self.matrices) / total) if total else 0.0


def extract_lora(
    base: AnyPath,
    tuned: AnyPath,
    out: AnyPath,
    rank: int | None = None,
    *,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    allowed_dir: AnyPath | None = None,
    seed: int = 0,
) -> ExtractResult:
    """Write the LoRA that comes nearest to `tuned` - `base`. One matrix at a time and the adapter are in memory.

    Args:
        rank: of every pair, or
        energy: 0 to 1, the share of each delta's squared norm to keep; every matrix gets the rank that it needs. Takes
            exact decompositions; `rank` takes randomised ones where matrices are large.
        targets: patterns of the matrices to decompose (`rwkv_lab.patterns`); the others are carried whole where they
            changed. None: all of the layers. "head.weight" may be named too; emb, of which a model takes rows, is
            always whole.
        dtype: "bf16", "fp16" or "fp32" of the pairs; None that of the tuned matrix.
        seed: of the randomised decomposition.
    Raises:
        ParameterError: neither or both of rank and energy, a rank larger than a matrix, or nothing that changed.
        LayoutError, OutputError, UnsafeFileError, CorruptFileError: as `merge`.
        NumericsError: NaN or Inf in a delta.
    """
    given = dict(locals())
    spec = ExtractSpec.read({name: given[name] for name in ExtractSpec.model_fields})
    options = MergeOptions.read({"overwrite": overwrite, "allowed_dir": allowed_dir})
    path = to_path(out, "out").absolute()
    file_kind(path)
    with open_checkpoint(spec.base) as base_ck, open_checkpoint(spec.tuned) as tuned_ck:
        check_merge_output(path, [base_ck, tuned_ck], options.allowed_dir, options.overwrite)
        chosen = _matrices_to_decompose(base_ck, tuned_ck, spec)
        changed = _changed(base_ck, tuned_ck)
        pairs = {}
        with Progress("decomposing", len(chosen & set(changed)), "matrices") as progress:
            for name in (n for n in changed if n in chosen):
                pairs[name] = _decomposed(base_ck.info[name], tuned_ck.info[name], spec)
                progress.advance(1)
        return _written(path, base_ck, tuned_ck, spec, changed, pairs, options.overwrite)


def _matrices_to_decompose(base: Checkpoint, tuned: Checkpoint, spec: ExtractSpec) -> set[str]:
    """Names, after checking that the two belong together."""
    refuse_same_file(base, [tuned])
    layout = check_base(base, [])
    for ck in (base, tuned):
        refuse_packed(ck.path, ck.info.values(), "Extracting an adapter")
        check_dtypes(ck)
    _check_tuned(base, tuned, layout)
    matrices = [n for n, t in tuned.info.items() if n in base.info and (n == HEAD or is_block_matrix(n, t.shape))]
    refuse_unmatched("targets", spec.targets, matrices, "matrices that can be decomposed")
    chosen = {n for n in matrices if (is_selected(n, spec.targets, None) if spec.targets else n != HEAD)}
    _check_rank(spec.rank, [base.info[n] for n in matrices if n in chosen])
    return chosen


def _written(
    out: Path,
    base: Checkpoint,
    tuned: Checkpoint,
    spec: ExtractSpec,
    changed: list[str],
    pairs: Mapping[str, Pair],
    overwrite: bool,
) -> ExtractResult:
    """Write the adapter and its provenance."""
    found = [pair.kept for pair in pairs.values()]
    whole = tuple(n for n in changed if n not in pairs)
    alpha = max((m.rank for m in found), default=0)
    inputs, downloads = (file_facts(base), file_facts(tuned)), (downloaded(base), downloaded(tuned))
    made = provenance(spec.recipe(alpha), inputs, job="extract_lora", downloads=downloads)
    tensors = _tensors(changed, pairs, alpha, tuned)
    note = {NOTE: json.dumps(lora_note("lora", "none", float(alpha)))} if pairs else {}  # else it is no adapter
    file = file_layout(file_kind(out), tensors, {RECORD: as_text(made), **note})
    check_free_space(out, file.size, 0, "the extraction")
    write_stream(out, tensors, file, overwrite, scan=lambda t: True)
    facts = file_facts(out)
    details = {"matrices": [vars(m) for m in found], "whole": list(whole)}
    write_text(provenance_path(out), text_beside(made | details, facts, []), overwrite)
    log.info("%d pairs with alpha %g, %d tensors whole", len(found), alpha, len(whole))
    return ExtractResult(spec.base, spec.tuned, out, float(alpha), tuple(found), whole, (facts,))


def _check_tuned(base: Checkpoint, tuned: Checkpoint, layout: Layout) -> None:
    if tuned.kind not in ("model", "partial"):
        raise ParameterError(f"{tuned.path} is of kind {tuned.kind!r}; a LoRA is extracted from a fine-tune")
    refuse_other_dimensions(tuned, layout)
    check_full_tensors(base, tuned, layout, dict(tuned.info), [])


def _check_rank(rank: int | None, matrices: list[TensorInfo]) -> None:
    small = next((t for t in matrices if rank is not None and rank > min(t.shape)), None)
    if small is not None:
        raise ParameterError(f"rank {rank} is larger than {small.name} {list(small.shape)} allows: {min(small.shape)}")


def _changed(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Names of the tuned file whose values are not the base's."""
    out = []
    with Progress("comparing", sum(t.nbytes for t in tuned.info.values())) as progress:
        for name, t in tuned.info.items():
            there = base.info.get(name)
            if there is None or any(not torch.equal(a.double(), b.double()) for a, b in in_step([there, t])):
                out.append(name)
            progress.advance(t.nbytes)
    if not out:
        raise ParameterError(f"nothing in {tuned.path} differs from {base.path}; there is no adapter to extract")
    return out


def _decomposed(base: TensorInfo, tuned: TensorInfo, spec: ExtractSpec) -> Pair:
    rank, energy, dtype = spec.rank, spec.energy, spec.output_dtype
    delta = tuned.read().double() - base.read().double()  # [out, in]
    if not bool(delta.isfinite().all()):
        raise NumericsError(f"{base.name}: tuned - base has NaN or Inf; there is no decomposition of it")
    largest = float(delta.abs().max())
    delta /= largest  # squares of the smallest differences would be 0
    length = float(torch.linalg.vector_norm(delta))
    if rank is None or min(delta.shape) <= max(_EXACT_BELOW, 4 * rank):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        u, s, vh = _randomised(delta.float(), rank, spec.seed)
    kept = (s.double() ** 2).cumsum(0) / length**2
    # Rounding may leave the last sum a little below 1.
    r = rank or min(int((kept < (energy or 0.0) * (1 - 1e-12)).sum()) + 1, len(s))
    u = u[:, :r]
    # The sign of a pair of vectors has no meaning; it is fixed, so that the same deltas give the same file.
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)  # [r]
    root = s[:r].double().sqrt() * math.sqrt(largest) * sign
    b, a = u * root, vh[:r] * root[:, None]
    a, b = (t.to(dtype or tuned.dtype) for t in (a, b))
    error = float(torch.linalg.vector_norm(delta - b.double() @ a.double() / largest)) / length
    return Pair(a, b, Extracted(base.name, r, min(float(kept[r - 1]), 1.0), error, length * largest))


def _randomised(delta: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and vectors, from where random directions go under Δ Δᵀ."""
    g = torch.Generator().manual_seed(seed)
    width = min(rank + _MORE, *delta.shape)
    q = torch.linalg.qr(delta @ torch.randn(delta.shape[1], width, generator=g, device="cpu")).Q  # [out, width]
    for _ in range(_ROUNDS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    return q @ u, s, vh


def _tensors(names: list[str], pairs: Mapping[str, Pair], alpha: int, tuned: Checkpoint) -> list[OutTensor]:
    """The adapter's tensors. B is scaled so that alpha / r gives 1 for every rank."""
    out = []
    for name in names:
        if name not in pairs:
            t = tuned.info[name]
            out.append(OutTensor(name, t.shape, t.dtype, source=t))
            continue
        a, b = pairs[name].A, pairs[name].B
        b = b.double() * (a.shape[0] / alpha)
        stem = name.removesuffix(".weight")
        for half, values in (("A", a), ("B", b)):
            shape, flat = tuple(values.shape), values.reshape(-1)
            out.append(OutTensor(f"{stem}.lora_{half}", shape, a.dtype, compute=lambda flat=flat: [flat]))
    return out
