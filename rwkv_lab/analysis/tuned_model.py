"""A base with a tuning worked into it, in float32, whose tensors can be set back to the base's one by one."""

from collections.abc import Callable, Iterable

import torch

from rwkv_lab.analysis.texts import fixed_tokens
from rwkv_lab.analysis.tuning import Tuning
from rwkv_lab.arguments import checked
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.machine import memory_free
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.peft import load_adapter
from rwkv_lab.progress import human_bytes

_COPIES = 2  # of a model in float32 at a time: the model, and the tensors of it that are being changed
_SAME = "logits with the tuning merged here, and with it loaded as it was trained: relative RMS difference"
_ROUNDING = 1e-4  # float32: sums in another order, grown by some tens of layers
_LEVELS = 1e-2  # of a base in fewer bits: what lies in the middle of two levels may go to either


@checked
def why_not_run(tuning: Tuning) -> str:
    """Why the model cannot run here, in words; "" if there is memory for it. Read from headers."""
    needed, free = 4 * _COPIES * sum(info.numel for info in tuning.base.info.values()), memory_free()
    if needed <= free:
        return ""
    return f"the model needs {human_bytes(needed)} of memory, {human_bytes(free)} are free"


@checked
def tuned_model(tuning: Tuning) -> RWKV_Dual:
    """The base with everything that the tuning changes worked into it, in float32."""
    model = RWKV_Dual.from_pretrained(tuning.base.path, weights="dense").requires_grad_(False)
    if any(name.endswith(".time_state") for name in tuning.names()):
        model.add_time_state()
    set_tensors(model, [name for name in tuning.base.info if tuning.is_quantised(name)], tuning.before)
    set_tensors(model, tuning.names(), tuning.after)
    return model


@checked
def model_as_trained(tuning: Tuning) -> RWKV_Dual:
    """The model as its trainer has it: the adapter beside its frozen base, the state loaded, the fine-tune's file."""
    overlay = tuning.method == "overlay"
    model = RWKV_Dual.from_pretrained(tuning.tuned.path if overlay else tuning.base.path, weights="dense")
    if tuning.method == "state":
        model.load_state_file(tuning.tuned.path)
    elif tuning.adapter:
        load_adapter(model, tuning.adapter, tuning.quant)
    return model.requires_grad_(False)


@checked
@torch.no_grad()
def set_tensors(model: RWKV_Dual, names: Iterable[str], values: Callable[[str], torch.Tensor]) -> None:
    """Copy values into parameters of a model.

    Args:
        values: name -> tensor of as many elements, such as `Tuning.before` or `Tuning.after`.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:  # what nothing reads, such as RWKV-7's v0 of layer 0, has no place in a model
            parameters[name].copy_(values(name).view_as(parameters[name]))


@checked
@torch.no_grad()
def checked_model(tuning: Tuning) -> tuple[RWKV_Dual, Check | NotApplicable]:
    """`tuned_model`, and whether its logits are those of `model_as_trained`; one model at a time is in memory."""
    if tuning.method == "overlay" and tuning.tuned.kind != "model":
        return tuned_model(tuning), NotApplicable(_SAME, "a part of a model does not run by itself")
    tokens = fixed_tokens(tuning.layout.vocab_size)
    trained = model_as_trained(tuning).parallel(tokens)[0].double()
    model = tuned_model(tuning)
    apart = model.parallel(tokens)[0].double() - trained
    relative = float(apart.square().mean().sqrt() / trained.square().mean().sqrt())
    limit = _ROUNDING if tuning.quant == "none" else _LEVELS
    return model, Check(_SAME, float(f"{relative:.1g}"), limit, relative <= limit)
