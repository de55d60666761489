"""The layout of RWKV-LM-LoRA and of RWKV-PEFT before it turned to Hugging Face's peft: one file, bare names.

* LoRA and PiSSA: `X.lora_A [r, in]` and `X.lora_B [out, r]`. Neither alpha nor which of the two it is stands in it.
* PiSSA's start, a file of its own: `X.init_lora_A` and `X.init_lora_B`; newer ones begin with `model.`.
* MiSS: `X.disha`, earlier `X.bone`: `[r, out]`, or three dimensions for "bat".
* Any other tensor is whole, and takes the place of the base's.
What rwkv_lab saves has PiSSA's start in the same file, and a note with what the layout leaves open.
"""

import json
import re

from rwkv_lab.checkpoint import Checkpoint, TensorInfo
from rwkv_lab.errors import CorruptFileError, LayoutError, ParameterError
from rwkv_lab.peft.adapter import Adapter, LoraTarget, MissTarget, Values
from rwkv_lab.peft.asked import Asked
from rwkv_lab.peft.linear import lora_scaling

NOTE = "rwkv_lab.adapter"  # the note's name in the file
_PART = re.compile(
    r"^(?P<layer>.+)\.(?:(?P<lora>(?:init_)?lora_[AB])(?:\.default)?(?:\.weight)?"
    r"|(?P<miss>disha|bone|bone_block|miss_block)(?:\.default)?)$"
)
_PEFT_PREFIX = "base_model.model."  # of tensors that were taken out of a Hugging Face adapter folder


def read(ck: Checkpoint, asked: Asked) -> Adapter:
    """The adapter in an open file.

    Raises: as `open_adapter`.
    """
    note = _note(ck)
    layers, full = _sorted(ck)
    if not layers:
        raise LayoutError(f"{ck.path} has no tensor named *.lora_A, *.disha or *.bone; it is of kind {ck.kind!r}.")
    kinds = {"miss" if "miss" in parts else "lora" for parts in layers.values()}
    if len(kinds) == 2:
        raise LayoutError(f"{ck.path} holds LoRA and MiSS together; an adapter is one of them.")
    if kinds == {"miss"}:
        asked.check_lora_only(ck.path, "MiSS")
        targets = {x: MissTarget(p["miss"], _variant(x, p["miss"], note, ck, asked)) for x, p in layers.items()}
        return Adapter("miss", targets, full, layout="rwkv-peft", quant=note.get("quant"))
    return _read_lora(ck, asked, note, layers, full)


def _read_lora(ck: Checkpoint, asked: Asked, note: dict, layers, full) -> Adapter:
    for x, parts in layers.items():
        wanted = {"lora_A", "lora_B"} | ({"init_lora_A", "init_lora_B"} if any("init" in p for p in parts) else set())
        if wanted - set(parts):
            has, lacks = sorted(parts)[0], sorted(wanted - set(parts))[0]
            raise LayoutError(f"{x}.{has} is there, {x}.{lacks} is not; {ck.path} is incomplete.")
    started = ["init_lora_A" in parts for parts in layers.values()]
    if any(started) and not all(started):
        raise LayoutError(f"{ck.path} says for {sum(started)} of {len(started)} layers what they started from.")
    if note:
        pissa = note["method"] == "pissa"
        if asked.says_pissa and not pissa:
            raise ParameterError(f"{ck.path} says that it is {note['method']}, not PiSSA; leave out what PiSSA needs.")
    else:
        pissa = any(started) or asked.says_pissa
    if any(started) and asked.says_pissa:
        raise ParameterError(f"{ck.path} holds what it started from; leave out pissa_init and residual_base.")
    if pissa and not any(started) and not asked.says_pissa:
        raise ParameterError(
            f"{ck.path} is PiSSA: say pissa_init= (what it started from, with the original base), or\n"
            "residual_base=True where the base is what the SVD left over."
        )
    if pissa and not note:
        if asked.alpha is not None or asked.use_rslora:
            raise ParameterError("alpha is not used by PiSSA in RWKV-PEFT's layout: its scale is 1; leave it out.")
    elif note:
        asked.agree("alpha", asked.alpha, note["alpha"], ck.path)
        asked.agree("use_rslora", asked.use_rslora, note["use_rslora"], ck.path)
    elif asked.alpha is None:
        raise ParameterError(
            f"{ck.path} does not say its alpha, which must be known: say alpha= (16, 32 and 64 are common).\n"
            "If it is PiSSA, say pissa_init= or residual_base=True instead."
        )
    targets = {}
    for x, parts in layers.items():
        A, B = parts["lora_A"], parts["lora_B"]
        rank = A.shape[0] if A.shape else 0
        alpha = note["alpha"] if note else (rank or 1) if pissa else asked.alpha
        rs = note["use_rslora"] if note else bool(asked.use_rslora) and not pissa
        targets[x] = LoraTarget(A, B, alpha, rs, pissa, parts.get("init_lora_A"), parts.get("init_lora_B"))
    method = "pissa" if pissa else "lora"
    return Adapter(method, targets, full, layout="rwkv-peft", quant=note.get("quant"))


def _sorted(ck: Checkpoint) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """({layer: its parts by name, "miss" for a block}, whole tensors)."""
    prefix = ck.identity.prefix
    if all(name.startswith(_PEFT_PREFIX) for name in ck.info):
        prefix = _PEFT_PREFIX
    layers: dict[str, dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    for name, info in ck.info.items():
        name = name.removeprefix(prefix)
        match = _PART.match(name)
        if not match:
            full[name] = info
            continue
        parts, part = layers.setdefault(match["layer"], {}), match["lora"] or "miss"
        if part in parts:
            raise LayoutError(f"{ck.path} has {parts[part].name} and {info.name}, which are the same part of a layer.")
        parts[part] = info
    return layers, full


def _variant(x: str, block: TensorInfo, note: dict, ck: Checkpoint, asked: Asked) -> str:
    if len(block.shape) == 3:
        return asked.choose_bat(ck.path, note.get("variant"))
    if len(block.shape) != 2 or 0 in block.shape:
        raise LayoutError(f"{ck.path}: {x} has a block {list(block.shape)}; two dimensions, or three for a bat, exist.")
    if asked.bat is not None:
        raise ParameterError(f"bat was given, and the blocks of {ck.path} have two dimensions: they are no bat.")
    return "default"


def _note(ck: Checkpoint) -> dict:
    """What rwkv_lab wrote when it saved the file; {} for files of others."""
    text = ck.metadata.get(NOTE)
    if text is None:
        return {}
    try:
        note = json.loads(text)
        if note["method"] != "miss":
            lora_scaling(note["alpha"], 1)
            note["use_rslora"] = bool(note["use_rslora"])
        return note
    except (ValueError, KeyError, TypeError, RecursionError, ParameterError) as e:
        raise CorruptFileError(f"{ck.path}: its note {NOTE} cannot be understood ({e}).") from e


def written(adapter: Adapter) -> tuple[dict[str, Values], str]:
    """(tensors by name, the note) of a file in this layout.

    Raises:
        ParameterError: MiSS that RWKV-PEFT does not have, alphas that differ between layers.
    """
    if adapter.method == "miss":
        variants = {t.variant for t in adapter.targets.values()}
        if variants - {"default", "bat-rwkv-peft"} or len(variants) > 1:
            raise ParameterError(
                f"RWKV-PEFT has no MiSS of the kind {' and '.join(sorted(variants))}: save it to a folder, which\n"
                "becomes one of Hugging Face's peft."
            )
        return {f"{x}.disha": t.block for x, t in adapter.targets.items()} | dict(adapter.full), json.dumps(
            {"method": "miss", "quant": adapter.quant, "variant": variants.pop()}
        )
    scalings = {(t.alpha, t.use_rslora) for t in adapter.targets.values()}
    if len(scalings) > 1:
        raise ParameterError(
            f"alpha differs between layers ({sorted(a for a, _ in scalings)[:4]}), and a file in RWKV-PEFT's layout\n"
            "has one for all: save it to a folder, which becomes one of Hugging Face's peft."
        )
    alpha, use_rslora = scalings.pop()
    return adapter.tensors(), lora_note(adapter.method, adapter.quant, alpha, use_rslora)


def lora_note(method: str, quant: str | None, alpha: float, use_rslora: bool = False) -> str:
    """The note, called `NOTE`, in a file of "lora" or "pissa"; `quant` says how training stored the base."""
    return json.dumps({"method": method, "quant": quant, "alpha": alpha, "use_rslora": use_rslora})


def written_init(adapter: Adapter) -> dict[str, Values]:
    """Tensors of an `init_pissa.pth`, named as RWKV-PEFT's trainer names them.

    Raises:
        ParameterError: no PiSSA, or one without its start.
    """
    if adapter.method != "pissa" or adapter.residual_base:
        raise ParameterError(f"{adapter.where} is no PiSSA adapter that knows what it started from.")
    parts = ("init_lora_A", "init_lora_B")
    return {f"model.{x}.{part}": t.tensors[part] for x, t in adapter.targets.items() for part in parts}
