"""AdamW as RWKV is trained with it: which parameter gets which learning rate and decay, and the rate over time."""

import math

import torch

_WEIGHT_DECAY = 0.1
_WARMUP = 0.05  # of all steps
_FINAL = {"pretrain": 0.02, "state": 0.01}  # last learning rate as a share of the first: 1 -> 0.01 for states


def make_optimiser(model, kind: str, lr: float) -> torch.optim.AdamW:
    """AdamW over the parameters that `kind` trains; all others are frozen.

    pretrain: weight decay on matrices that end in `.weight` only (not on vectors, LayerNorms and low-rank pairs), and
    twice the learning rate for `att.w0`, from which the decay of the state comes. state: `time_state` alone, no decay.
    """
    groups = {(0.0, 1.0): [], (0.0, 2.0): [], (_WEIGHT_DECAY, 1.0): []}  # (weight decay, factor on lr)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind != "state" or name.endswith(".time_state"))
        if not parameter.requires_grad:
            continue
        if name.endswith(".att.w0"):
            groups[0.0, 2.0].append(parameter)
        elif name.endswith(".weight") and parameter.ndim == 2:
            groups[_WEIGHT_DECAY, 1.0].append(parameter)
        else:
            groups[0.0, 1.0].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": lr * factor, "factor": factor}
            for (decay, factor), parameters in groups.items()
            if parameters
        ],
        betas=(0.9, 0.99),
        eps=1e-18,  # start values and gradients are tiny: a usual 1e-8 would slow them down
        fused=True,
    )


def set_lr(optimiser: torch.optim.AdamW, kind: str, lr: float, step: int, steps: int) -> None:
    """Learning rate for `step` (from 0): linear warm-up, then a cosine down to the kind's final share."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        share = (step + 1) / warmup
    else:
        share = _FINAL[kind] + (1 - _FINAL[kind]) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    for group in optimiser.param_groups:
        group["lr"] = lr * share * group["factor"]
