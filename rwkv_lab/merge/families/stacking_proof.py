"""Proof of stacks: every tensor is a copy; which one, read off the runs of layers again."""

from __future__ import annotations

import re

from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.proof import Exact, Proof, ProofInputs, Source


class StackingProof(Proof):
    def __init__(self, inputs: ProofInputs):
        super().__init__(inputs)
        self._copies = self._stacked()

    def sources(self) -> dict[str, Source | None]:
        return dict(self._copies)

    def _stacked(self) -> dict[str, Source]:
        files, order = [self.inputs.base, *self.inputs.tuned], []
        for run in self.inputs.recipe["parameters"]["layers"]:
            who, first, last = re.split(r"[\[:\]]", run.replace(" ", ""))[:3]
            which = 0 if who == "base" else int(who.removeprefix("tuned") or 1)
            order += [(files[which], i) for i in range(int(first), int(last))]
        out: dict[str, Source] = {}
        for place, (file, i) in enumerate(order):
            for n in file:
                prefix = f"blocks.{i}."
                if n.startswith(prefix) and not (place and ".ln0." in n):
                    out[f"blocks.{place}.{n[len(prefix) :]}"] = (file, n)
        out |= {n: (order[0][0], n) for n in order[0][0] if n == "emb.weight"}
        return out | {n: (order[-1][0], n) for n in order[-1][0] if n.split(".")[0] in ("ln_out", "head")}

    def like(self, name: str) -> torch.Tensor:
        file, source = self._copies[name]
        return file[source]

    def exact(self, name: str) -> Exact:
        raise KeyError(name)  # nothing is computed
