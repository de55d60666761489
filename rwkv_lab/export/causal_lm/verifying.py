"""Whether a merged folder is the base with its adapter: by hash, by another computation, and by peft itself."""

import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_lab.checkpoint import TensorInfo
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ModelMergeError
from rwkv_lab.export.causal_lm.adapter import open_adapter
from rwkv_lab.export.causal_lm.folder import CausalLmFolder, open_folder
from rwkv_lab.export.causal_lm.loading import load_causal_lm, quiet
from rwkv_lab.export.causal_lm.merging import Change, plan_merge

_TOKENS = (2, 16)  # batch and length that logits are compared at
_EXACT = 1e-5  # relative to the logits' scale: rounding of float32 along two ways


def verify_merge(base: Path, adapter: Path, merged: Path) -> list[Check | NotApplicable]:
    """Compare what was written with the base and the adapter, all of them read anew.

    Raises:
        LayoutError, CorruptFileError, UnsafeFileError: a folder cannot be read.
    """
    with (b := open_folder(base)).ck, (a := open_adapter(adapter)).ck, (m := open_folder(merged)).ck:
        plan = plan_merge(b, a)
        checks = [_names(b, m, plan.untied), _untouched(b, m, plan.changes), _recomputed(m, plan.changes)]
        dtype = min((m.tensors[name].dtype for name in plan.changes), key=lambda d: d.itemsize)
    return [*checks, _logits(base, adapter, merged, dtype)]


def _names(base: CausalLmFolder, merged: CausalLmFolder, untied: bool) -> Check:
    expected = {name: tuple(info.shape) for name, info in base.tensors.items()}
    if untied:
        expected[base.head] = expected[base.embedding]
    found = {name: tuple(info.shape) for name, info in merged.tensors.items()}
    wrong = {*expected.items()} ^ {*found.items()}
    return Check(f"tensors missing, extra or of another shape, of {len(expected)}", len(wrong), 0, not wrong)


def _untouched(base: CausalLmFolder, merged: CausalLmFolder, changes: dict[str, Change]) -> Check:
    names = [name for name in base.tensors if name not in changes]
    wrong = [name for name in names if _hash(base.tensors[name]) != _hash(merged.tensors[name])]
    if merged.head in merged.tensors and base.tied and base.head not in changes:
        names.append(base.head)
        wrong += [] if _hash(base.tensors[base.embedding]) == _hash(merged.tensors[base.head]) else [base.head]
    name = f"untouched tensors whose SHA-256 differs from the base's, of {len(names)}"
    return Check(name, len(wrong), 0, not wrong)


def _hash(info: TensorInfo) -> str:
    digest = hashlib.sha256(str(info.dtype).encode())
    for block in info.blocks():
        digest.update(block.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _recomputed(merged: CausalLmFolder, changes: dict[str, Change]) -> Check:
    """Against a computation of whole matrices in float64; the limit is what float32 and one rounding may cost."""
    worst = 0.0
    for name, change in changes.items():
        found, exact = merged.tensors[name].read().double(), _exact(change)
        unit = torch.finfo(merged.tensors[name].dtype).eps
        slack = unit * exact.abs() + 1e-6 * float(exact.abs().max())
        worst = max(worst, float(((found - exact).abs() / slack.clamp_min(1e-30)).max()))
    name = f"changed tensors computed again in float64: largest error in units of the rounding, of {len(changes)}"
    return Check(name, worst, 1.0, worst <= 1.0)


def _exact(change: Change) -> torch.Tensor:
    weight = change.source.read().double()
    if change.bias is not None:
        return weight + change.scale * change.bias.read().double()
    if (layer := change.layer) is None:
        return weight
    product = layer.B.read().double() @ layer.A.read().double()
    sum_ = weight + layer.scale * (product.T if layer.transposed else product)
    if layer.magnitude is None:
        return sum_
    return layer.magnitude.read().double().reshape(-1, 1) * sum_ / torch.linalg.vector_norm(sum_, dim=1, keepdim=True)


def _logits(base: Path, adapter: Path, merged: Path, dtype: torch.dtype) -> Check | NotApplicable:
    """Of the merged model, beside the base with the adapter as peft runs both, one after the other in float32."""
    name = f"logits beside peft's base with adapter, weights stored in {str(dtype).removeprefix('torch.')}"
    if missing := [package for package in ("transformers", "peft") if find_spec(package) is None]:
        return NotApplicable(name, f"the package {missing[0]} is not installed")
    expected, found = _run_by_peft(base, adapter), _run(load_causal_lm(merged), merged)
    scale = max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(found - expected).max()) / scale if found.shape == expected.shape else float("inf")
    limit = _EXACT if dtype.itemsize >= 4 else 8 * torch.finfo(dtype).eps
    return Check(f"{name}: largest error relative to their scale", error, limit, error <= limit)


def _run_by_peft(base: Path, adapter: Path) -> np.ndarray:
    from peft import PeftModel

    model = load_causal_lm(base)
    try:
        with quiet():
            return _run(PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").eval(), base)
    except Exception as e:  # peft raises errors of many kinds
        raise ModelMergeError(f"peft does not take {adapter}: {str(e).splitlines()[0][:300]}") from e


def _run(model: Any, folder: Path) -> np.ndarray:
    """Logits float32 `[B,T,V]` of random tokens."""
    size = model.get_input_embeddings().weight.shape[0]
    length = min(_TOKENS[1], model.config.max_position_embeddings or _TOKENS[1])
    tokens = np.random.default_rng(0).integers(0, size, (_TOKENS[0], length))
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float().numpy()


def failed(checks: Iterable[Check | NotApplicable]) -> list[Check]:
    """Those that were not passed."""
    return [check for check in checks if isinstance(check, Check) and not check.passed]
