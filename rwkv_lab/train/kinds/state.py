"""State tuning: only the state that every sequence starts from is trained, `blocks.i.att.time_state` `[H,V,K]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_lab import model as models
from rwkv_lab import peft
from rwkv_lab.checkpoint import Layout, open_checkpoint, write_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.errors import ParameterError
from rwkv_lab.train.spec import KINDS, Defaults, Kind, Planned, TrainSpec, register


class InitialState(Kind):
    """The output is the states alone, float32."""

    name = output_kind = "state"
    # A tuned state counts most near the start of a text, so its windows are shorter. RWKV-LM: from 1 down to 0.01.
    defaults = Defaults("python", steps=400, batch_size=8, ctx_len=128, lr=1.0, final_lr=0.01)
    takes = frozenset({"start", "quant"})
    compared_lr = 2.0

    def make_model(self, spec: TrainSpec) -> models.RWKV_Dual:
        model = models.RWKV_Dual.from_pretrained(spec.base, dtype=spec.torch_dtype, device=spec.device)
        model.add_time_state()
        peft.quantise_blocks(model, spec.quant)
        self.mark_trained(model)
        return model

    def started(self, spec: TrainSpec) -> TrainSpec:
        with open_checkpoint(spec.start) as ck:
            if ck.kind != "state":
                raise ParameterError(
                    f"start={spec.start!r} is of kind {ck.kind}, and kind='state' was given.\n"
                    + (f"Pass kind={ck.kind!r}." if ck.kind in KINDS else "A tuned state is needed.")
                )
        return spec

    def mark_trained(self, model: models.RWKV_Dual) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".time_state"))

    def planned(self, spec: TrainSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Planned]:
        return planned_states(layout)

    def save(self, model: models.RWKV_Dual, out: Path, note: Mapping[str, str], overwrite: bool) -> None:
        states = {name: p for name, p in model.named_parameters() if p.requires_grad}
        write_checkpoint(out, states, metadata=note, overwrite=overwrite)

    def open(self, spec: TrainSpec, out: Path) -> models.RWKV_Dual:
        model = models.RWKV_Dual.from_pretrained(spec.base, dtype=spec.torch_dtype, device=spec.device)
        model.load_state_file(out)
        peft.quantise_blocks(model, spec.quant)
        return model

    def output_checks(self, names: Sequence[str]) -> list[Check]:
        others = sum(not name.endswith(".time_state") for name in names)
        return [Check("tensors in the output that are no states", others, 0, others == 0)]


def planned_states(layout: Layout) -> list[Planned]:
    """The states of a model."""
    shape = (layout.n_head, layout.head_size, layout.head_size)
    return [(f"blocks.{i}.att.time_state", shape, math.prod(shape)) for i in range(layout.n_layer)]


register(InitialState())
