"""Where an output is used: which programs read it, and the lines of Python that load it with them."""

from dataclasses import dataclass
from pathlib import Path

from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.checkpoint.foreign_format import ForeignFormat
from rwkv_lab.convert.adapters import is_adapter
from rwkv_lab.convert.plan import ConvertPlan

_MODEL = """
from rwkv_lab import RWKV_Dual
model = RWKV_Dual.from_pretrained("{path}")
print(model.generate_with_streaming("The capital of France is", 32))
"""
_RWKV_PACKAGE = """
from rwkv.model import RWKV  # of PyPI rwkv; RWKV-7 needs os.environ["RWKV_V7_ON"] = "1" before it
model = RWKV(model="{stem}", strategy="cpu fp32")
logits, state = model.forward([0], None)
"""
_ADAPTER = """
from rwkv_lab import merge
merge("base.pth", "{path}", "merged.pth")  # any format of the base
"""
_PEFT = """
from peft import PeftModel
# model: the base in {target}, loaded as its own report states
model = PeftModel.from_pretrained(model, "{path}")
"""
_STATE = """
from rwkv_lab import RWKV_Dual
model = RWKV_Dual.from_pretrained("base.pth")
model.load_state_file("{path}")
"""
_THEIR_STATE = """
from safetensors.torch import load_file
states = load_file("{path}")  # by layer, [heads, K, V]
# they go into the recurrent states of the cache that the model takes as past_key_values
"""
_PART = """
from rwkv_lab import open_checkpoint
with open_checkpoint("{path}") as ck:
    print(ck.kind, list(ck))
"""


@dataclass(frozen=True)
class Usage:
    """One way to use an output."""

    program: str  # that reads it
    code: str  # Python that loads it with that program


def usage(plan: ConvertPlan) -> list[Usage]:
    """Where the output of a plan is used, the program it was written for first; paths are the output's name alone."""
    folder, known = plan.container.is_folder, plan.format
    ways = _adapter_ways(folder) if plan.as_adapter else _ways(plan.kind, plan.layout, known, plan.out.suffix)
    return [Usage(program, _filled(code, plan.out, known)) for program, code in ways]


def usage_of(ck: Checkpoint, name: str) -> list[Usage]:
    """As `usage`, of a checkpoint under another name."""
    known = ck.foreign_format
    ways = _adapter_ways(ck.path.is_dir()) if is_adapter(ck) else _ways(ck.kind, ck.layout, known, ck.path.suffix)
    return [Usage(program, _filled(code, Path(name), known)) for program, code in ways]


def _adapter_ways(folder: bool) -> list[tuple[str, str]]:
    return [("peft", _PEFT), ("rwkv_lab", _ADAPTER)] if folder else [("rwkv_lab", _ADAPTER)]


def _ways(kind: str, layout: Layout | None, known: ForeignFormat | None, suffix: str) -> list[tuple[str, str]]:
    if layout is not None and known is not None:
        return [(known.read_by, known.use), ("rwkv_lab", _MODEL)] if known.use else [("rwkv_lab", _MODEL)]
    if layout is not None:
        package = [("rwkv, BlinkDL's package", _RWKV_PACKAGE)] if suffix == ".pth" else []
        return [("rwkv_lab", _MODEL), *package]
    if known is not None:
        return [(known.read_by, _THEIR_STATE), ("rwkv_lab", _STATE)]
    return [("rwkv_lab", {"state": _STATE}.get(kind, _PART))]


def _filled(code: str, path: Path, known: ForeignFormat | None) -> str:
    target = "BlinkDL's names" if known is None else known.described
    words = {"path": path.name, "stem": path.stem, "target": target}
    for name, value in words.items():
        code = code.replace("{" + name + "}", value)
    return code.strip()
