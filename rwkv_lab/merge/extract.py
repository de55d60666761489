"""The reverse of merging a LoRA: from a base and a fine-tune of it, an adapter that brings one near the other.

Every matrix of the layers that changed becomes a pair in the layout that `lora` reads, from the singular value
decomposition of its delta; every other tensor that changed is carried whole. The alpha to merge the adapter with (its
largest rank) stands in the file, as that of an adapter trained here: merging needs none, and refuses another.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_lab.checkpoint import Checkpoint, FileFacts, Layout, TensorInfo, file_facts, open_checkpoint, write_text
from rwkv_lab.checkpoint.file_layout import file_layout
from rwkv_lab.checkpoint.stream import OutTensor
from rwkv_lab.checkpoint.write import file_kind, write_stream
from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.machine import disk_free, memory_free
from rwkv_lab.merge.change import in_step
from rwkv_lab.merge.overlay import check_full_tensors, same_dimensions
from rwkv_lab.merge.patterns import pattern_list
from rwkv_lab.merge.provenance import RECORD, as_text, beside, provenance
from rwkv_lab.merge.refusals import check_base, check_dtypes, output_dtype, refuse_same
from rwkv_lab.merge.room import check_output, check_room
from rwkv_lab.names import is_block_matrix
from rwkv_lab.paths import to_path
from rwkv_lab.patterns import is_selected, refuse_unmatched
from rwkv_lab.peft.kinds.lora import lora_note
from rwkv_lab.peft.rwkv_peft_layout import NOTE
from rwkv_lab.progress import Progress

log = logging.getLogger(__name__)

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
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    allowed_dir: str | Path | None = None,
    seed: int = 0,
) -> ExtractResult:
    """Write the LoRA that comes nearest to `tuned` - `base`. One matrix at a time and the adapter are in memory.

    Args:
        rank: of every pair, or
        energy: 0 to 1, the share of each delta's squared norm to keep; every matrix gets the rank that it needs. Takes
            exact decompositions; `rank` takes randomised ones where matrices are large.
        targets: shell-style patterns of the matrices to decompose; the others are carried whole where they changed.
            None: all of the layers. "head.weight" may be named too; emb, of which a model takes rows, is always whole.
        dtype: "bf16", "fp16" or "fp32" of the pairs; None that of the tuned matrix.
        seed: of the randomised decomposition.
    Raises:
        ParameterError: neither or both of rank and energy, a rank larger than a matrix, or nothing that changed.
        LayoutError, OutputError, UnsafeFileError, CorruptFileError: as `merge`.
        NumericsError: NaN or Inf in a delta.
    """
    base, tuned, out = (to_path(p, what).absolute() for p, what in ((base, "base"), (tuned, "tuned"), (out, "out")))
    _check_amount(rank, energy)
    pair_dtype, kind = output_dtype(dtype), file_kind(out)
    note = out.with_name(out.name + ".json")
    with open_checkpoint(base) as base_ck, open_checkpoint(tuned) as tuned_ck:
        for path in (out, note):
            check_output(path, [base_ck, tuned_ck], allowed_dir, overwrite)
        refuse_same(base_ck, [tuned_ck])
        layout = check_base(base_ck, [])
        for ck in (base_ck, tuned_ck):
            check_dtypes(ck)
        _check_tuned(base_ck, tuned_ck, layout)
        targets = pattern_list("targets", targets)
        matrices = [n for n, t in tuned_ck.info.items() if n in base_ck.info and _is_matrix(n, t)]
        refuse_unmatched("targets", targets, matrices, "matrices that can be decomposed")
        chosen = {n for n in matrices if (is_selected(n, targets, None) if targets else n != HEAD)}
        _check_rank(rank, [base_ck.info[n] for n in matrices if n in chosen])
        changed = _changed(base_ck, tuned_ck)
        found, pairs = [], {}
        with Progress("decomposing", len(chosen & set(changed)), "matrices") as progress:
            for name in (n for n in changed if n in chosen):
                a, b, matrix = _decomposed(base_ck.info[name], tuned_ck.info[name], rank, energy, pair_dtype, seed)
                pairs[name], found = (a, b), [*found, matrix]
                progress.advance(1)
        whole = tuple(n for n in changed if n not in pairs)
        alpha = max((m.rank for m in found), default=0)
        recipe = {"rank": rank, "energy": energy, "alpha": float(alpha), "dtype": str(pair_dtype or ""), "seed": seed}
        recipe["targets"] = targets
        inputs = (file_facts(base_ck), file_facts(tuned_ck))
        made = provenance(recipe, inputs, job="extract_lora")
        tensors = _tensors(changed, pairs, alpha, tuned_ck)
        said = {NOTE: json.dumps(lora_note("lora", "none", float(alpha)))} if pairs else {}  # else it is no adapter
        file = file_layout(kind, tensors, {RECORD: as_text(made), **said})
        check_room(out, file.size, disk_free(out.parent), 0, memory_free())
        write_stream(out, tensors, file, overwrite, scan=lambda t: True)
        facts = file_facts(out)
        details = {"matrices": [vars(m) for m in found], "whole": list(whole)}
        write_text(note, beside(made | details, facts, []), overwrite)
    log.info("%d pairs with alpha %g, %d tensors whole", len(found), alpha, len(whole))
    return ExtractResult(base, tuned, out, float(alpha), tuple(found), whole, (facts,))


def _check_amount(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ParameterError("give rank or energy, one of them: how much of the deltas the adapter keeps")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ParameterError(f"rank={rank!r}: a whole number of at least 1 is needed")
    if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
        raise ParameterError(f"energy={energy!r}: it is a share, above 0 and at most 1")


def _check_tuned(base: Checkpoint, tuned: Checkpoint, layout: Layout) -> None:
    if tuned.kind not in ("model", "partial"):
        raise ParameterError(f"{tuned.path} is of kind {tuned.kind!r}; a LoRA is extracted from a fine-tune")
    same_dimensions(tuned, layout)
    check_full_tensors(base, tuned, layout, dict(tuned.info), [])


def _is_matrix(name: str, info: TensorInfo) -> bool:
    return name == HEAD or is_block_matrix(name, info.shape)


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


def _decomposed(
    base: TensorInfo, tuned: TensorInfo, rank: int | None, energy: float | None, dtype: torch.dtype | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor, Extracted]:
    """(A [r, in], B [out, r], what they keep), with Δ near B A."""
    delta = tuned.read().double() - base.read().double()  # [out, in]
    if not bool(delta.isfinite().all()):
        raise NumericsError(f"{base.name}: tuned - base has NaN or Inf; there is no decomposition of it")
    largest = float(delta.abs().max())
    delta /= largest  # squares of the smallest differences would be 0
    length = float(torch.linalg.vector_norm(delta))
    if energy is not None or min(delta.shape) <= max(_EXACT_BELOW, 4 * rank):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        u, s, vh = _randomised(delta.float(), rank, seed)
    kept = (s.double() ** 2).cumsum(0) / length**2
    # Rounding may leave the last sum a little below 1.
    r = rank or min(int((kept < energy * (1 - 1e-12)).sum()) + 1, len(s))
    u = u[:, :r]
    # The sign of a pair of vectors has no meaning; it is fixed, so that the same deltas give the same file.
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)  # [r]
    root = s[:r].double().sqrt() * math.sqrt(largest) * sign
    b, a = u * root, vh[:r] * root[:, None]
    a, b = (t.to(dtype or tuned.dtype) for t in (a, b))
    error = float(torch.linalg.vector_norm(delta - b.double() @ a.double() / largest)) / length
    return a, b, Extracted(base.name, r, min(float(kept[r - 1]), 1.0), error, length * largest)


def _randomised(delta: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and vectors, from where random directions go under Δ Δᵀ."""
    g = torch.Generator().manual_seed(seed)
    width = min(rank + _MORE, *delta.shape)
    q = torch.linalg.qr(delta @ torch.randn(delta.shape[1], width, generator=g)).Q  # [out, width]
    for _ in range(_ROUNDS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ delta, full_matrices=False)
    return q @ u, s, vh


def _tensors(names: list[str], pairs: dict, alpha: int, tuned: Checkpoint) -> list[OutTensor]:
    """The adapter's tensors. B is scaled so that alpha / r gives 1 for every rank."""
    out = []
    for name in names:
        if name not in pairs:
            t = tuned.info[name]
            out.append(OutTensor(name, t.shape, t.dtype, source=t))
            continue
        a, b = pairs[name]
        b = b.double() * (a.shape[0] / alpha)
        stem = name.removesuffix(".weight")
        for half, values in (("A", a), ("B", b)):
            shape, flat = tuple(values.shape), values.reshape(-1)
            out.append(OutTensor(f"{stem}.lora_{half}", shape, a.dtype, compute=lambda flat=flat: [flat]))
    return out
