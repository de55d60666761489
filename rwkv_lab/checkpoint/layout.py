"""Which generation of RWKV a checkpoint holds, and how large it is: read from names and shapes alone, in any order."""

import re
from collections.abc import Mapping

import rwkv_lab.checkpoint.generations  # noqa: F401  # makes the generations known
from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint.dimensions import Layout, Shape, same_shape
from rwkv_lab.checkpoint.generation import ATT, GENERATIONS, SHARED_NAMES, Generation, Shapes, generations
from rwkv_lab.errors import LayoutError
from rwkv_lab.names import split_block

__all__ = [
    "UNUSED_IN_LAYER_0",
    "Layout",
    "Shape",
    "detect_layout",
    "possible_versions",
    "same_shape",
    "unsupported_variant",
]

UNUSED_IN_LAYER_0 = tuple(f"blocks.0.{name}" for g in generations() for name in g.unused_in_layer_0)

_HUGGING_FACE = "Hugging Face names of no format that is known here"

CONVERTED = "a file converted by ChatRWKV (transposed, rescaled, ln0 folded in); use the original .pth"

# What is recognised but not supported: a name that only this variant has, and what the variant is called.
_VARIANTS = [
    (r"^_(strategy|version|rescale_layer)$", CONVERTED),
    (r"\.weight_[mr][xy]$", CONVERTED),  # int8 matrices there
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
    (r"^(model\.layers|rwkv\.blocks|model\.embeddings)\.", _HUGGING_FACE),
]
_MARK = re.compile("|".join(pattern for pattern, _ in _VARIANTS))


def unsupported_variant(names: list[str]) -> tuple[str, str] | None:
    """(what the variant is called, the name that gives it away), None where nothing is recognised."""
    marked = [name for name in names if _MARK.search(name)]  # of most files none
    for pattern, called in _VARIANTS:
        name = next((name for name in marked if re.search(pattern, name)), None)
        if name is None or called is _HUGGING_FACE and any(map(split_block, names)):  # then theirs are left over
            continue
        return called, name
    return None


def possible_versions(names: list[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The generations that could hold all these names, and one name for each restriction."""
    patterns = [p for g in generations() for p in g.names if p not in SHARED_NAMES]
    versions, evidence = frozenset(GENERATIONS), []
    for pattern in (*dict.fromkeys(patterns), *SHARED_NAMES):
        allowed = frozenset(version for g in generations() for version in g.names.get(pattern, ()))
        name = next((n for n in names if re.search(pattern, n)), None)
        if name is not None and not versions <= allowed:
            versions &= allowed
            evidence.append(name)
    return versions, tuple(evidence)


@checked
def detect_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Generation and dimensions from `{name: shape}`, names without wrapper prefix.

    No rule depends on the order of names, on a second layer, or on a file name.

    Raises:
        LayoutError: not an RWKV model, one of an unsupported variant, or too incomplete to be measured.
    """
    variant = unsupported_variant(list(shapes))
    if variant:
        raise LayoutError(f"not supported: {variant[0]} (recognised by {variant[1]})")
    s = Shapes(shapes)
    vocab_size, n_embd = s.matrix("emb.weight")
    layers = sorted({inside[0] for n in shapes if (inside := split_block(n))})
    if not layers:
        raise LayoutError("not an RWKV model: there is no blocks.0.*")
    if layers != list(range(len(layers))):
        gap = next(i for i in range(len(layers)) if i not in layers)
        raise LayoutError(f"not a complete RWKV model: blocks.{gap}.* is missing, blocks.{layers[-1]}.* is there")
    ffn_key = "blocks.0.ffn.key.weight"
    dim_att, dim_ffn = s.matrix(ATT + "key.weight")[0], s.matrix(ffn_key)[0]
    generation, version, deciding = _recognise(s, dim_att)
    n_head = generation.n_head(s, version, dim_att) if generation.n_head else 0
    if generation.n_head and (not n_head or dim_att % n_head):
        raise LayoutError(f"{dim_att} attention channels cannot be split into {n_head} heads ({deciding})")
    evidence = [f"{n} {list(shapes[n])}" for n in (deciding, "emb.weight", ATT + "key.weight", ffn_key)]
    return Layout(
        version=version,
        n_layer=len(layers),
        n_embd=n_embd,
        dim_att=dim_att,
        dim_ffn=dim_ffn,
        vocab_size=vocab_size,
        n_head=n_head,
        head_size=dim_att // n_head if n_head else 0,
        ranks=generation.ranks(s, len(layers)),
        evidence=(*evidence, f"blocks.0 … blocks.{layers[-1]}"),
    )


def _recognise(s: Shapes, dim_att: int) -> tuple[Generation, str, str]:
    """The generation, its version, and the name that decided."""
    for generation in generations():
        if found := generation.recognise(s, dim_att):
            return generation, *found
    raise LayoutError(f"not an RWKV model: {ATT}* has none of {', '.join(g.recognised_by for g in generations())}")
