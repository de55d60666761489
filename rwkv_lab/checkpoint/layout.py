"""Which generation of RWKV a checkpoint holds, and how large it is: read from names and shapes alone, in any order.

Shapes are compared without their dimensions of size 1: files of third parties hold `[C]` where BlinkDL's hold `[1, 1,
C]`, and one-head models come with their head dimension squeezed away.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rwkv_lab.errors import LayoutError
from rwkv_lab.names import split_block

Shape = tuple[int, ...]

# Layer 0 of RWKV-7 makes v_first, which its own v0, v1 and v2 would mix in: most files lack them, nothing reads them.
UNUSED_IN_LAYER_0 = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


@dataclass(frozen=True)
class Layout:
    """Generation and dimensions of an RWKV model."""

    version: str  # "4.0", "5.0", "5.1", "5.2", "6.0" or "7.0"
    n_layer: int
    n_embd: int  # C
    dim_att: int  # A; equal to C in every released model
    dim_ffn: int  # F
    vocab_size: int  # V
    n_head: int  # H; 0 for v4, which has no heads
    head_size: int  # N; 0 for v4
    ranks: Mapping[str, int] = field(default_factory=dict)  # v6: "maa", "decay"; v7: "w", "a", "v", "g"
    evidence: tuple[str, ...] = ()  # the names and shapes that decided

    def __str__(self) -> str:
        heads = f", {self.n_head} heads of {self.head_size}" if self.n_head else ""
        ranks = ", ranks " + " ".join(f"{k} {v}" for k, v in self.ranks.items()) if self.ranks else ""
        return (
            f"RWKV-{self.version}: {self.n_layer} layers, n_embd {self.n_embd}{heads}, "
            f"dim_ffn {self.dim_ffn}, vocabulary {self.vocab_size}{ranks}"
        )


# What is recognised but not supported: a name that only this variant has, and what the variant is called.
_VARIANTS = [
    (r"^_strategy$", "a file converted by ChatRWKV (transposed, rescaled, ln0 folded in); use the original .pth"),
    (r"^blocks\.\d+\.tiny_(ln|q|k|v)\b", "RWKV-4a (tiny attention)"),
    (r"^blocks\.\d+\.att\.(qq|kk|vv|oo)\.", "RWKV-4b"),
    (r"^(head_q|head_k)\.|^copy_mask$", "RWKV-4 with head_qk"),
    (r"^blocks\.0\.ffnPre\.", "RWKV-4 with pre_ffn"),
    (r"^blocks\.0\.pos_emb_[xy]$", "RWKV-4 with position embedding"),
    (r"^blocks\.\d+\.ffn\.(aa|bb)\.", "RWKV-4 with MishGLU"),
    (r"^blocks\.\d+\.att\.gate_w[12]$", "RWKV-6a"),
    (r"^blocks\.\d+\.att\.time_maa_rkvw_w[12]$", "RWKV-6b or 6c"),
    (r"^blocks\.\d+\.rosa\.", "RWKV-8 ROSA"),
    (r"^blocks\.\d+\.ffn\.enn\.", "RWKV-8 release candidate"),
    (r"^blocks\.\d+\.qkv\.", "RWKV-7b"),
    (r"^blocks\.\d+\.ffn\.s_emb", "RWKV-7a (DeepEmbed)"),
    (r"^(model\.layers|rwkv\.blocks|model\.embeddings)\.", "Hugging Face names; rwkv_lab reads BlinkDL's"),
]

_PREFIXES = ("_forward_module.", "module.", "model.")


def common_prefix(names: Mapping[str, object] | list[str]) -> str:
    """The wrapper prefix (`module.`, `model.`, `_forward_module.`, or several) that every name carries, "" if none."""
    names, found = list(names), ""
    while names:
        here = next((p for p in _PREFIXES if all(n.startswith(found + p) for n in names)), None)
        # `model.layers.…` and `model.embeddings.…` are Hugging Face names, not a wrapped BlinkDL model.
        if here is None or any(n.startswith((found + "model.layers.", found + "model.embeddings.")) for n in names):
            break
        found += here
    return found


def unsupported_variant(names: list[str]) -> tuple[str, str] | None:
    """(what the variant is called, the name that gives it away), None where nothing is recognised."""
    for pattern, called in _VARIANTS:
        for name in names:
            if re.search(pattern, name):
                return called, name
    return None


# Names that only some generations have: how a part of a model, or an adapter, tells where it comes from.
_GENERATION_MARKS = [
    (r"\.att\.(r_k|k_k|k_a|x_[rwkvag]|[wav]0|[wavg][12])$|\.ffn\.x_k$", frozenset({"7.0"})),
    (r"\.time_maa_|\.time_decay_w[12]$", frozenset({"6.0"})),
    (r"\.att\.time_mix_g$", frozenset({"5.1", "5.2"})),
    (r"\.att\.time_faaaa$", frozenset({"5.0", "5.1", "5.2", "6.0"})),
    (r"\.att\.gate\.", frozenset({"5.1", "5.2", "6.0"})),
    (r"\.time_mix_[kvr]$", frozenset({"4.0", "5.0", "5.1", "5.2"})),
    (r"\.time_first$", frozenset({"4.0", "5.0", "5.1"})),
    (r"\.ffn\.receptance\.", frozenset({"4.0", "5.0", "5.1", "5.2", "6.0"})),
    (r"\.att\.ln_x\.", frozenset({"5.0", "5.1", "5.2", "6.0", "7.0"})),
    (r"\.time_state$", frozenset({"5.0", "5.1", "5.2", "6.0", "7.0"})),
]
ALL_VERSIONS = frozenset({"4.0", "5.0", "5.1", "5.2", "6.0", "7.0"})


def possible_versions(names: list[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The generations that could hold all these names, and one name for each restriction."""
    versions, evidence = ALL_VERSIONS, []
    for pattern, allowed in _GENERATION_MARKS:
        name = next((n for n in names if re.search(pattern, n)), None)
        if name is not None and not versions <= allowed:
            versions &= allowed
            evidence.append(name)
    return versions, tuple(evidence)


def _core(shape: Shape) -> Shape:
    return tuple(d for d in shape if d != 1)


def same_shape(found: Shape, expected: Shape) -> bool:
    """Equal up to dimensions of size 1."""
    return found == expected or _core(found) == _core(expected)


class _Shapes:
    """Looks shapes up by name, with an error that names what is missing."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def matrix(self, name: str) -> Shape:
        """Shape of a tensor that must have two dimensions."""
        if name not in self.shapes:
            raise LayoutError(f"not a complete RWKV model: {name} is missing")
        shape = self.shapes[name]
        if len(shape) != 2 or 0 in shape:
            raise LayoutError(f"not an RWKV model: {name} has shape {list(shape)}, a matrix is expected")
        return shape

    def numel(self, name: str) -> int:
        if name not in self.shapes:
            raise LayoutError(f"not a complete RWKV model: {name} is missing")
        total = 1
        for d in self.shapes[name]:
            total *= d
        return total

    def heads(self, name: str, dim_att: int) -> tuple[int, int]:
        """(n_head, head_size) from a tensor `[H, N]`, whose H may have been squeezed away where it is 1."""
        shape, numel = self.shapes[name], self.numel(name)
        if numel != dim_att:
            raise LayoutError(f"{name} has {numel} values, dim_att is {dim_att}: they must be equal")
        core = _core(shape)
        if len(core) == 2:
            return core[0], core[1]
        if len(shape) == 2 and shape[1] == 1:
            return shape[0], 1
        if dim_att > 256:  # no head is that wide: this is [H, N] flattened, and N cannot be read off any more
            raise LayoutError(f"{name} has shape {list(shape)}: its heads were flattened away; [H, N] is expected")
        return 1, dim_att


def detect_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Generation and dimensions from `{name: shape}`, names without wrapper prefix.

    Rules of `rwkv_facts` §1.8: no rule depends on the order of names, on a second layer, or on a file name.

    Raises:
        LayoutError: not an RWKV model, one of an unsupported variant, or too incomplete to be measured.
    """
    variant = unsupported_variant(list(shapes))
    if variant:
        raise LayoutError(f"not supported: {variant[0]} (recognised by {variant[1]})")
    s = _Shapes(shapes)
    vocab_size, n_embd = s.matrix("emb.weight")
    layers = sorted({inside[0] for n in shapes if (inside := split_block(n))})
    if not layers:
        raise LayoutError("not an RWKV model: there is no blocks.0.*")
    if layers != list(range(len(layers))):
        gap = next(i for i in range(len(layers)) if i not in layers)
        raise LayoutError(f"not a complete RWKV model: blocks.{gap}.* is missing, blocks.{layers[-1]}.* is there")
    att, ffn = "blocks.0.att.", "blocks.0.ffn."
    dim_att, dim_ffn = s.matrix(att + "key.weight")[0], s.matrix(ffn + "key.weight")[0]
    version, deciding = _version(s, att, dim_att)

    n_head = head_size = 0
    if version in ("5.0", "5.1"):
        n_head = s.numel(att + "time_decay")
    elif version != "4.0":
        source = att + {"5.2": "time_faaaa", "6.0": "time_faaaa", "7.0": "r_k"}[version]
        if source not in s:
            raise LayoutError(f"not a complete RWKV model: {source} is missing")
        n_head, head_size = s.heads(source, dim_att)
    if version != "4.0":
        if not n_head or dim_att % n_head:
            raise LayoutError(f"{dim_att} attention channels cannot be split into {n_head} heads ({deciding})")
        head_size = dim_att // n_head

    evidence = [f"{n} {list(shapes[n])}" for n in (deciding, "emb.weight", att + "key.weight", ffn + "key.weight") if n]
    evidence.append(f"blocks.0 … blocks.{layers[-1]}")
    return Layout(
        version,
        len(layers),
        n_embd,
        dim_att,
        dim_ffn,
        vocab_size,
        n_head,
        head_size,
        _ranks(s, version, len(layers)),
        tuple(evidence),
    )


def _version(s: _Shapes, att: str, dim_att: int) -> tuple[str, str]:
    """(generation, the name that decided it). Any one name of a generation will do: which are missing is said later."""

    def first(*names: str) -> str | None:
        return next((att + n for n in names if att + n in s), None)

    if mark := first("r_k", "k_k"):
        return "7.0", mark
    if mark := first(*(f"time_maa_{z}" for z in "xwkvrg")):
        if att + "gate.weight" not in s:
            raise LayoutError(f"not supported: RWKV-6 without gate ({mark} is there, {att}gate.weight is not)")
        return "6.0", mark
    mark = first("time_mix_k", "time_mix_v", "time_mix_r")
    if mark and first("ln_x.weight", "ln_x.bias"):
        # One decay per head, or one per channel: a squeezed [1, N] of a one-head 5.2 model counts N = dim_att values.
        if s.numel(att + "time_decay") == dim_att:
            return "5.2", att + "time_decay"
        return ("5.1" if first("gate.weight", "time_mix_g") else "5.0"), att + "time_decay"
    if mark:
        return "4.0", first("time_first") or mark
    raise LayoutError(f"not an RWKV model: {att}* has none of r_k (7), time_maa_* (6), time_mix_* (4, 5)")


def _ranks(s: _Shapes, version: str, n_layer: int) -> dict[str, int]:
    """Low-rank dimensions, which no formula of n_embd gives reliably: two are in circulation."""
    att = "blocks.0.att."
    if version == "6.0":
        return {"maa": s.matrix(att + "time_maa_w1")[1] // 5, "decay": s.matrix(att + "time_decay_w1")[1]}
    if version == "7.0":
        ranks = {name: s.matrix(f"{att}{name}1")[1] for name in "wag"}
        # Layer 0 has no use for v1: released files leave it out, so a one-layer model may have none at all.
        v1 = next((f"blocks.{i}.att.v1" for i in [*range(1, n_layer), 0] if f"blocks.{i}.att.v1" in s), None)
        if v1 or n_layer > 1:
            ranks["v"] = s.matrix(v1 or "blocks.1.att.v1")[1]
        return ranks
    return {}
