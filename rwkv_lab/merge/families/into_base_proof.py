"""Proof of the methods "state" and "overlay": copies, or a share of the way from base to tuned in float64."""

from __future__ import annotations

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.proof import Exact, Proof, Source


class IntoBaseProof(Proof):
    def sources(self) -> dict[str, Source | None]:
        base, (tuned,), recipe = self.inputs.base, self.inputs.tuned, self.inputs.recipe
        out: dict[str, Source | None] = {name: (base, name) for name in base}
        if recipe["alpha"] == 0:
            return out
        names = [n for n in tuned if recipe["method"] != "state" or n.endswith(".time_state")]
        copied = recipe["alpha"] == 1
        return out | {n: (tuned, n) if copied else None for n in names if self.inputs.may_change(n)}

    def exact(self, name: str) -> Exact:
        base, (tuned,), alpha = self.inputs.base, self.inputs.tuned, self.inputs.recipe["alpha"]
        precision = self.inputs.precision
        t = tuned[name].reshape(-1)
        weight = base[name].reshape(-1) if name in base else torch.zeros_like(t)

        def blend(part: slice) -> tuple[list[torch.Tensor], torch.Tensor]:
            w, to = weight[part].double(), t[part].double()
            size = w.abs() + to.abs() + precision.smallest_normal
            return [w + alpha * (to - w)], 4 * precision.eps * size

        return blend
