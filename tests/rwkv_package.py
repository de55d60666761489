"""Runs the PyPI package `rwkv` in a process of its own: it reads its settings from the environment when imported.

What it needs, and real files have: the path without its suffix for RWKV-7, and names in an order that lets it tell the
generation (ln_x and gate before time_decay, time_maa before time_faaaa; a real file's second layer comes after its
first one's ln_x). It cannot run dim_att != n_embd from RWKV-5 on, nor read the time_state of a one-head model.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
from warm_python import Warm

_RUN = """
import json, sys
import numpy as np
import torch
from rwkv.model import RWKV
for path, tokens, initial in json.loads(sys.argv[1]):
    model = RWKV(model=path, strategy="cpu fp32")
    out, state = {}, None
    if initial:
        state = model.generate_zero_state()
        for name, tensor in torch.load(initial, weights_only=True).items():
            state[3 * int(name.split(".")[1]) + 1] = tensor.float()
    out["logits"], state = model.forward(tokens, state, full_output=True)
    state = {f"state{i}": s.clone() for i, s in enumerate(state)}
    one = None
    steps = []
    for token in tokens:
        logits, one = model.forward([token], one)
        steps.append(logits.numpy())
    out |= state | {f"one{i}": s for i, s in enumerate(one)}
    np.savez(path + ".npz", steps=np.stack(steps), **{name: x.numpy() for name, x in out.items()})
"""
_FIRST = ("ln_x", "gate.weight", "time_maa")


def in_its_order(tensors: dict) -> dict:
    return dict(sorted(tensors.items(), key=lambda item: not any(part in item[0] for part in _FIRST)))


def run_rwkv_package(warm: Warm, jobs: list[tuple[Path, list[int]]], v7: bool, state: Path | None = None) -> list[dict]:
    """For each (path without .pth, tokens): `logits` [T,V] and `state0…` of one call with all tokens, `steps` [T,V] and
    `one0…` of a call per token.

    Args:
        state: a .pth with a tuned state that RWKV-7 starts from in the first of them; it reads none in a model.
    """
    environment = warm.environment | {"RWKV_V7_ON": str(int(v7)), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    command = [
        warm.python,
        "-c",
        _RUN,
        json.dumps([(str(path), tokens, state and str(state)) for path, tokens in jobs]),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [dict(np.load(f"{path}.npz")) for path, _ in jobs]
