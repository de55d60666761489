"""Training of adapters, one kind of training for each kind of adapter that `rwkv_lab.peft` knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from rwkv_lab import model as models
from rwkv_lab import peft
from rwkv_lab.checkpoint import Layout
from rwkv_lab.lazy_torch import torch
from rwkv_lab.names import is_block_matrix
from rwkv_lab.peft import ADAPTER_KINDS, LoraConfig, open_adapter, save_adapter
from rwkv_lab.peft.files import check_savable
from rwkv_lab.peft.selection import target_modules, trained_parts
from rwkv_lab.train.kinds.state import planned_states
from rwkv_lab.train.spec import Defaults, Kind, Planned, TrainSpec, register
from rwkv_lab.train.starting import planned_further, with_settings_of

# Of four or five, on the demo model and its Python code, the one that reached fewest bits in 100 steps.
_COMPARED_LR = {"miss": 1e-2}


class Adapters(Kind):
    """The output is the adapter: a file, or a folder of Hugging Face's peft where its name has no suffix."""

    defaults = Defaults("python", steps=200, batch_size=8, ctx_len=128, lr=1e-2, final_lr=0.02)
    may_be_folder = True

    def __init__(self, method: str):
        self.name = self.output_kind = method
        alpha = ["alpha"] if ADAPTER_KINDS[method].takes_alpha else []
        self.takes = frozenset({"start", "rank", "targets", "train_parts", "quant", *alpha})
        self.compared_lr = _COMPARED_LR.get(method, 2e-2)

    def make_model(self, spec: TrainSpec) -> models.RWKV_Dual:
        base = SimpleNamespace(peft_load_path=spec.base, dtype=spec.torch_dtype, device=torch.device(spec.device))
        return peft.load_model_and_apply_peft(base, adapter_config(spec))

    def started(self, spec: TrainSpec) -> TrainSpec:
        return with_settings_of(spec, self.name)

    def mark_trained(self, model: models.RWKV_Dual) -> None:
        """All that `load_adapter` made trainable; in float32 at least, or small updates would be rounded away."""
        for parameter in peft.adapter_parameters(model).values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def planned(self, spec: TrainSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Planned]:
        if spec.start:
            return planned_further(spec, layout, shapes)
        states = {name: shape for name, shape, _ in planned_states(layout)} if "time_state" in spec.train_parts else {}
        config, tree = adapter_config(spec), _tree(dict(shapes) | states)
        rows: list[Planned] = []
        counts: dict[tuple[int, int], int] = {}  # by shape: a model has few, and each is tried on a layer
        for name in target_modules(tree, config.lora_target_modules, "targets"):
            out, into = shapes[f"{name}.weight"]
            if (out, into) not in counts:
                counts[out, into] = peft.planned_parameters(name, out, into, config)
            rows.append((f"{name}.weight", (out, into), counts[out, into]))
        besides = dict(tree.named_parameters())
        for name in trained_parts(tree, config.train_parts):
            rows.append((name, tuple(besides[name].shape), besides[name].numel()))
        return rows

    def save(self, model: models.RWKV_Dual, out: Path, note: Mapping[str, str], overwrite: bool) -> None:
        save_adapter(peft.adapter_of(model), out, overwrite, note)

    def open(self, spec: TrainSpec, out: Path) -> models.RWKV_Dual:
        model = models.RWKV_Dual.from_pretrained(spec.base, dtype=spec.torch_dtype, device=spec.device)
        with open_adapter(out) as adapter:
            peft.load_adapter(model, adapter, spec.quant)
        return model

    def check_savable(self, model: models.RWKV_Dual, out: Path) -> None:
        check_savable(peft.adapter_of(model), out)

    def recorded(self, model: models.RWKV_Dual) -> dict[str, str]:
        start = ADAPTER_KINDS[self.name].start_fingerprint(peft.adapters(model).values())
        return {} if start is None else {"start": start}


def adapter_config(spec: TrainSpec) -> LoraConfig:
    """The settings of the adapters. Those of a bfloat16 model are float32, or small updates would be rounded away.

    Raises:
        ParameterError: see `LoraConfig`.
    """
    rank = spec.effective("rank")
    return LoraConfig(
        method=spec.kind,
        lora_target_modules=spec.targets or None,
        lora_r=rank,
        lora_alpha=2.0 * rank if spec.alpha is None else spec.alpha,
        quant=spec.quant,
        train_parts=spec.train_parts,
        adapter_dtype=torch.float32 if spec.dtype == "bfloat16" else None,
    )


def _tree(shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """Modules with these parameters and no memory behind them, in which layers are found by name."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        *parents, last = name.split(".")
        if is_block_matrix(name, shapes[name]):
            *parents, last = parents
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        if is_block_matrix(name, shapes[name]):
            module.add_module(last, torch.nn.Linear(shape[1], shape[0], bias=False, device="meta"))
        else:
            module.register_parameter(last, torch.nn.Parameter(torch.empty(shape, device="meta")))
    return root


for _method in ADAPTER_KINDS:
    register(Adapters(_method))
