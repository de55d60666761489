"""Files that hold what became of a model and not a model: what they are, and what to do about it.

Recognised are: weights that DeepSpeed left on its ranks, weights packed in few bits, an optimiser's state, the state of
a text that a model has read, and an interrupted training of rwkv_lab.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint.dimensions import Shape

_ZERO = "run DeepSpeed's zero_to_fp32.py, which lies in the checkpoint's folder, and give the file that it writes"
_WHOLE = "Give the original in 16 or 32 bits; where an adapter was trained on this, merge it into that with quant="
_GATHERED = "Save it with StateDictType.FULL_STATE_DICT, or\nget_model_state_dict and full_state_dict=True"
_DISTCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth"
# By a name that nothing else has: what packed it.
_PACKED = [
    (r"\.quant_state\.bitsandbytes__|\.(quant_map|nested_absmax)$", "4 bits by bitsandbytes"),
    (r"\.(SCB|weight_format)$", "8 bits by bitsandbytes"),
    (r"\.(qweight|qzeros)$", "few bits by GPTQ or AWQ"),
    (r"\.(W_q|weight_packed)$", "few bits by HQQ or compressed-tensors"),
    (r"\.weight\._(data|scale)$|\._packed_params(\.|$)", "8 bits or fewer by quanto or torch"),
    (r"\.weight_scale(_inv)?$", "8 bits with scales of their own"),
    (r"\.packed\.(codes|absmax)$", "few bits by rwkv_lab, as frozen weights in training"),
]
_ADAPTERS = [
    (r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?)$", "LoHa or LoKr of LyCORIS"),
    (r"\.(lora_mid\.weight|dora_scale)$", "a LoCon or DoRA of LyCORIS"),
    (r"\.(oft_[rR]|oft_blocks|boft_[Rs])(\.|$)", "OFT"),
    (r"\.(vera_lambda_[bd]|ia3_l)(\.|$)", "VeRA or IA3"),
    (r"\.lora_embedding_[AB](\.|$)", "a LoRA of an embedding"),
]
_MARK = re.compile("|".join(pattern for pattern, _ in (*_PACKED, *_ADAPTERS)))


@dataclass(frozen=True)
class Unusable:
    reason: str  # what it is and what to do
    evidence: str  # the name that decided


def unusable(shapes: Mapping[str, Shape], others: Mapping[str, object]) -> Unusable | None:
    """What keeps a file of these tensors from being used; None where nothing of the kind is seen.

    Args:
        others: entries that are no tensors.
    """
    empty = [name for name, shape in shapes.items() if shape == (0,) or 0 in shape and ".lora_" not in name]
    if empty:
        here = f"{len(empty)} of its {len(shapes)} tensors are empty, first {empty[0]}: DeepSpeed's ZeRO-3 left their"
        return Unusable(f"{here} values on its ranks;\n{_ZERO}", empty[0])
    marked = [name for some in (shapes, others) for name in map(str, some) if _MARK.search(name)]  # of most files none
    for pattern, how in _PACKED:
        if name := _first(pattern, marked):
            return Unusable(f"its weights are packed in {how} (there is {name}).\n{_WHOLE}", name)
    for pattern, what in _ADAPTERS:
        if name := _first(pattern, marked):
            return Unusable(f"it is {what} (there is {name}), which is not read.\nMerge it where it was trained", name)
    flat = _first(r"(^|\.)_?flat_param(_\d+)?$", shapes)
    if flat:
        return Unusable(f"FSDP has laid its tensors one behind the other ({flat}). {_GATHERED}", flat)
    if {"wkv", "att_shift", "ffn_shift"} <= set(shapes):
        return Unusable(
            "it is a saved RWKVState, what a model carries after a text, and no tuned state.\n"
            "It goes into load_state(path, model); a merge takes a file of blocks.*.att.time_state",
            "wkv",
        )
    course = next((name for name in shapes if name.startswith(("optimiser/", "trained/"))), None)
    if course:
        return Unusable("it is an interrupted training of rwkv_lab; train with resume=True to finish it", course)
    if "param_groups" in others:
        what = "it is the state of an optimiser, and no model; give the model that was saved with it"
        return Unusable(what, "param_groups")
    if {"dp_world_size", "ds_config", "ds_version"} & set(others):
        return Unusable(f"it is one rank's part of a DeepSpeed checkpoint;\n{_ZERO}", "dp_world_size")
    return None


def _first(pattern: str, names: Iterable[str]) -> str | None:
    search = re.compile(pattern).search
    return next(filter(search, names), None)


def nested_hint(others: Mapping[str, object]) -> str:
    """Where the tensors are, of a file that has none at its top level."""
    tables = {key: value for key, value in others.items() if isinstance(value, dict)}
    if not tables:
        return ""
    key = max(tables, key=lambda k: sum("." in str(name) for name in tables[k]))  # names of tensors have dots
    return f"; it has {key!r}, a dict of its own: save that one by itself"


def split_folder(folder: Path) -> str:
    """What to do with a folder whose model is split over the ranks of a training; "" where it is none."""
    names: Sequence[str] = sorted(
        str(p.relative_to(folder)) for p in (*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*"))
    )
    if any(re.search(r"(_model_states|_optim_states)\.pt$", name) for name in names):
        return f"{folder} is a checkpoint of DeepSpeed, split over its ranks;\n{_ZERO}."
    if any(name.endswith(".distcp") for name in names):
        return f"{folder} is a checkpoint of FSDP, split over its ranks. Join them:\n{_DISTCP}"
    return ""


def what_to_do_about(name: str) -> str:
    """Advice on a pickle that asks for `name`, "module.object", beside tensors."""
    if name.startswith("deepspeed."):
        return f"It is DeepSpeed's: {_ZERO}."
    if name.startswith("torch.distributed."):
        return f"It is one rank's part of a model. Join them: {_DISTCP}"
    if name.startswith("rwkv_lab.model.state."):
        return "It is a pickled RWKVState: save one with save_state, and read it with load_state."
    if name in ("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_sparse_csr_tensor"):
        return "Its tensors are sparse: save {name: t.to_dense() for name, t in model.state_dict().items()}."
    if name.startswith("torch._utils._rebuild_meta_tensor"):
        return "Its tensors are on the meta device and have no values: load the weights, then save it."
    if name.startswith(("numpy.", "_codecs.")):
        return "It holds NumPy arrays: save {name: torch.from_numpy(a) for name, a in ….items()}."
    packed = (
        "torchao.",
        "bitsandbytes.",
        "optimum.",
        "hqq.",
        "torch.q",
        "torch.torch.Q",
        "torch._utils._rebuild_qtensor",
    )
    if name.startswith(packed):
        return f"Its weights are packed in few bits. {_WHOLE}."
    return "Save it again where it comes from, as tensors only: torch.save(model.state_dict(), ...)."
