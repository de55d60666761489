"""Proof of mixes: each method's own formula (`MixingMethod.proof`) on whole tensors, with settings read again here."""

from __future__ import annotations

from typing import Any

from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch
from rwkv_lab.merge.mixing_method import MIXING
from rwkv_lab.merge.proof import Exact, Proof, ProofInputs, Source, WholeTensor, pattern_matches


class MixingProof(Proof):
    def __init__(self, inputs: ProofInputs):
        super().__init__(inputs)
        self.layers = 1 + max(int(n.split(".")[1]) for n in inputs.base if n.startswith("blocks."))

    def sources(self) -> dict[str, Source | None]:
        base, tuned, alpha = self.inputs.base, self.inputs.tuned, self.inputs.recipe["alpha"]
        unused = [f"blocks.0.att.v{i}" for i in range(3)]
        names = dict.fromkeys(n for t in tuned for n in t if n in base or n not in unused)
        computed = [n for n in names if alpha is None or setting_at(alpha, n, self.layers) != 0]
        out: dict[str, Source | None] = {name: (base, name) for name in base}
        return out | {n: None for n in computed if self.inputs.may_change(n)}

    def exact(self, name: str) -> Exact:
        recipe, method = self.inputs.recipe, MIXING[self.inputs.recipe["method"]]
        found = [t[name].reshape(-1) if name in t else None for t in (self.inputs.base, *self.inputs.tuned)]
        base = found[0]
        if base is None:
            base = torch.zeros_like(next(t for t in found if t is not None))
        tuned = [base if t is None else t for t in found[1:]]
        settings = {"alpha": recipe["alpha"], "weights": recipe["weights"], **recipe["parameters"]}
        values = {p: setting_at(settings[p], name, self.layers) for p in method.signature.parameters}
        return method.proof(WholeTensor(name, base, tuned, getattr(torch, recipe["precision"])), **values)


def setting_at(setting: Any, name: str, layers: int) -> Any:
    """What a setting of the recipe comes to for one tensor."""
    if isinstance(setting, list):
        return [setting_at(s, name, layers) for s in setting]
    if not isinstance(setting, dict):
        return setting
    if list(setting) == ["gradient"]:
        inside = name.startswith("blocks.")
        where = (int(name.split(".")[1]) / (layers - 1) if layers > 1 else 1.0) if inside else 0.0
        points = setting["gradient"]
        return float(np.interp(where, np.linspace(0, 1, len(points)), points)) if len(points) > 1 else points[0]
    return setting_at(next(s for p, s in setting.items() if pattern_matches(name, p)), name, layers)
