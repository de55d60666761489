"""A PiSSA adapter that is given as a LoRA: what B A is then is not a change of the base but a part of the base itself.

PiSSA starts from the largest singular values and vectors of W. So, with P the projection on the rows of A, B A is close
to W P: all that W does to the inputs which A sees. A LoRA's product is small beside W P, and points elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.checkpoint.source import BLOCK
from rwkv_lab.errors import ParameterError
from rwkv_lab.lazy_torch import no_grad, torch
from rwkv_lab.peft.adapter import Adapter
from rwkv_lab.peft.lora_target import LoraTarget

_LOOKED_AT = 16  # matrices that the adapter changes
_ALIKE = 0.85  # cosine of B A and W P: of PiSSA 0.99 and less by what training moved it, of a LoRA up to 0.3 or so
_FOUND = 0.2  # of ⟨B A, W⟩ / ‖B A‖², how far it may be from 1 in every matrix of a base that contains B A …
_SIGMAS = 3  # … or this often the deviation that W itself adds to it
_SURE = 8  # of those deviations that ⟨B A, W⟩ of all matrices is away from 0


@dataclass(frozen=True)
class _Compared:
    """Of one matrix, B A beside what the base does to the inputs that A sees, which is W P."""

    scale: float  # with which B A goes into the base
    cosine: float  # of both; 0 where their sizes are far apart
    along: float  # ⟨B A, W⟩
    length: float  # ‖B A‖²
    noise: float  # variance of ⟨B A, W⟩, were they unrelated

    def contains(self, scale: float) -> bool:
        """Whether W may hold B A with this scale."""
        allowed = max(_FOUND * abs(scale), _SIGMAS * self.noise**0.5 / self.length)
        return abs(self.along / self.length - scale) < allowed


def notes_on_products(adapter: Adapter, base: Checkpoint, ask: bool = True) -> list[str]:
    """Whether a LoRA's products stand in the base already. Reads a few matrices of both.

    Args:
        ask: refuse what seems to be PiSSA.
    Returns:
        Sentences where they seem to have been added once, or some of them to be of a PiSSA.
    Raises:
        ParameterError: they are the base's own largest parts, as PiSSA's are; says what to pass.
    """
    targets = {x: t for x, t in adapter.targets.items() if isinstance(t, LoraTarget) and f"{x}.weight" in base}
    if adapter.method != "lora" or not targets:
        return []
    found = _compared_some(targets, base)
    near = {x: one for x, one in found.items() if one.cosine > _ALIKE}
    if near and ask:
        first, most = next(iter(near)), max(one.cosine for one in near.values())
        if 2 * len(near) <= len(found):
            return [
                f"In {len(near)} of {len(found)} matrices {Path(adapter.where).name} holds what the base does itself "
                f"(first {first}, cosine up to {most:.2f}): if they are PiSSA's, they go in twice."
            ]
        raise ParameterError(
            f"{adapter.where} looks like PiSSA: in {len(near)} of {len(found)} matrices B A is what the base does "
            f"itself\n(first {first}, cosine up to {most:.2f}), and as a LoRA it would go in twice.\n"
            "Pass pissa_init= (what it started from), or method='lora' if it is a LoRA all the same."
        )
    if not near and _are_in(list(found.values())):
        return [
            f"{Path(adapter.where).name} seems to be in the base already, though its record does not say so: in "
            f"{len(found)} of {len(found)} matrices the base has B A once."
        ]
    return []


def _compared_some(targets: Mapping[str, LoraTarget], base: Checkpoint) -> dict[str, _Compared]:
    """Of some matrices, spread over the layers, in which the adapter changes anything."""
    names, found = list(targets), {}
    spread = names[:: max(len(names) // _LOOKED_AT, 1)]
    for x in dict.fromkeys([*spread, *names]):
        one = _compared(targets[x], base.info[f"{x}.weight"])
        if one is not None:
            found[x] = one
        if len(found) == _LOOKED_AT:
            break
    return found


def _are_in(found: Sequence[_Compared]) -> bool:
    """Whether all of them may be in the base once, as they are or scaled, and together surely are."""
    along, noise = sum(one.along for one in found), sum(one.noise for one in found)
    if not found or along <= _SURE * noise**0.5:
        return False
    return all(one.contains(1.0) for one in found) or all(one.contains(one.scale) for one in found)


@no_grad
def _compared(target: LoraTarget, weight: TensorInfo) -> _Compared | None:
    """Of as many rows as are read at a time; None where B A is zero there, or not finite."""
    B = target.B.read().float()
    if not B.any():
        return None
    columns = weight.shape[1]
    W = next(weight.blocks(multiple=columns)).view(-1, columns)[: max(BLOCK // columns, 1)].float()
    A, B = target.A.read().float(), B[: len(W)]
    Q = torch.linalg.qr(A.T).Q  # [in, r]
    own, product = W @ Q, B @ (A @ Q)  # [out, r]
    size, whole = float(own.square().sum()), float(W.square().sum())
    length, along = float(product.square().sum()), float((own * product).sum())
    if not (0 < size < float("inf") and 0 < length < float("inf")):
        return None
    cosine = along / (size * length) ** 0.5 if 0.01 < length / size < 100 else 0.0
    return _Compared(target.scaling, cosine, along, length, length * whole / W.numel())
