"""Generation and dimensions from shapes alone; what is not supported is named, with the evidence."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LAYOUTS, SEVEN

from rwkv_lab.checkpoint import Layout, compare, detect_layout, expected_tensors, open_checkpoint
from rwkv_lab.checkpoint.kind import identify
from rwkv_lab.errors import LayoutError, RwkvLabError

VERSIONS = list(LAYOUTS)
size = st.integers(2, 300)


@st.composite
def layouts(draw) -> Layout:
    """Any dimensions, one layer and one head included; attention may be wider than the model."""
    version = draw(st.sampled_from(VERSIONS))
    n_head, head_size = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    dim_att = n_head * head_size
    n_embd = dim_att if version == "7.0" else draw(st.sampled_from([dim_att, draw(size)]))
    ranks = {"6.0": ("maa", "decay"), "7.0": ("w", "a", "v", "g")}.get(version, ())
    return Layout(
        version,
        draw(st.integers(1, 3)),
        n_embd,
        dim_att,
        draw(size),
        draw(size),
        0 if version == "4.0" else n_head,
        0 if version == "4.0" else head_size,
        {r: draw(st.integers(2, 40)) for r in ranks},
    )


def shapes_of(layout, rng, squeeze=False, unused=False, state=False) -> dict:
    """Shapes of a file of that layout, in any order; squeezed where no matrix would lose a dimension."""
    required, optional = expected_tensors(layout)
    shapes = dict(required)
    for name, shape in optional.items():
        if state if "time_state" in name else unused:
            shapes[name] = shape
    if squeeze:
        shapes = {n: tuple(d for d in s if d != 1) for n, s in shapes.items()}
    names = list(shapes)
    rng.shuffle(names)
    return {n: shapes[n] for n in names}


@given(layouts(), st.randoms(use_true_random=False), st.booleans(), st.booleans(), st.booleans())
def test_any_layout_is_read_back(layout, rng, squeeze, unused, state):
    found = detect_layout(shapes := shapes_of(layout, rng, squeeze, unused, state))
    if layout.version == "7.0" and layout.n_layer == 1 and not unused:
        layout = replace(layout, ranks={k: r for k, r in layout.ranks.items() if k != "v"})  # no file says it
    assert replace(found, evidence=()) == layout
    misfit = compare(found, shapes)
    assert not misfit.missing and not misfit.extra and not misfit.wrong
    identity = identify(shapes, {}, None)
    assert identity.kind == "model" and identity.layout == found and identity.evidence


@given(layouts(), st.randoms(use_true_random=False), st.sampled_from(["module.", "_forward_module.model.", "model."]))
def test_a_wrapper_prefix_is_seen_through(layout, rng, prefix):
    shapes = {prefix + n: s for n, s in shapes_of(layout, rng).items()}
    identity = identify(shapes, {}, None)
    assert (identity.kind, identity.prefix, identity.layout.version) == ("model", prefix, layout.version)


@given(
    st.sampled_from(VERSIONS),
    st.randoms(use_true_random=False),
    st.dictionaries(st.integers(0, 60), st.lists(st.integers(0, 70), max_size=4), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_odd_shapes_give_a_layout_or_an_error_of_our_own(version, rng, changed, dropped):
    shapes = shapes_of(LAYOUTS[version], rng)
    names = sorted(shapes)
    for i, shape in changed.items():
        shapes[names[i % len(names)]] = tuple(shape)
    for name in rng.sample(names, dropped):
        shapes.pop(name)
    try:
        layout = detect_layout(shapes)
    except RwkvLabError:
        layout = None
    else:
        assert layout.n_layer >= 1 and min(layout.n_embd, layout.vocab_size, layout.dim_att, layout.dim_ffn) >= 1
        assert layout.version == "4.0" or layout.n_head * layout.head_size == layout.dim_att
    identify(shapes, {}, None)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_missing_tensor_makes_it_partial_and_is_named(version):
    shapes, _ = expected_tensors(LAYOUTS[version])
    for name in shapes:
        identity = identify({n: s for n, s in shapes.items() if n != name}, {}, None)
        assert identity.kind == "partial" and name in identity.reason, name


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_shape_is_found(version):
    shapes, _ = expected_tensors(LAYOUTS[version])
    for name, shape in shapes.items():
        wrong = {**shapes, name: (*shape[:-1], shape[-1] + 1)}
        try:
            misfit = compare(detect_layout(wrong), wrong)
        except LayoutError:
            continue
        assert misfit.wrong, name


ADDED = {  # what only this variant has: base version, added names, names taken away, how it is called
    "4a": ("4.0", ["blocks.1.tiny_q.weight"], [], "RWKV-4a"),
    "4b": ("4.0", ["blocks.0.att.qq.weight"], [], "RWKV-4b"),
    "4 head_qk": ("4.0", ["head_q.weight"], [], "head_qk"),
    "4 pre_ffn": ("4.0", ["blocks.0.ffnPre.key.weight"], [], "pre_ffn"),
    "4 positions": ("4.0", ["blocks.0.pos_emb_x"], [], "position embedding"),
    "4 MishGLU": ("4.0", ["blocks.0.ffn.aa.weight"], [], "MishGLU"),
    "6a": ("6.0", ["blocks.0.att.gate_w1"], ["blocks.0.att.gate.weight"], "RWKV-6a"),
    "6b": ("6.0", ["blocks.0.att.time_maa_rkvw_w1"], ["blocks.0.att.gate.weight"], "RWKV-6b or 6c"),
    "6 without gate": ("6.0", [], ["blocks.0.att.gate.weight", "blocks.1.att.gate.weight"], "RWKV-6 without gate"),
    "7a": ("7.0", ["blocks.0.ffn.s_emb.weight"], [], "RWKV-7a"),
    "7b": ("7.0", ["blocks.0.ffn.s_emb.weight", "blocks.1.qkv.qq.weight"], [], "RWKV-7b"),
    "8 rc": ("7.0", ["blocks.0.ffn.enn.weight"], [], "RWKV-8"),
    "8 rc hybrid": ("7.0", ["blocks.0.qkv.qq.weight", "blocks.0.ffn.enn.weight"], [], "RWKV-8"),
    "8 ROSA": ("7.0", ["blocks.0.rosa.x_q"], [], "ROSA"),
}


@pytest.mark.parametrize("variant", ADDED)
def test_what_is_not_supported_is_named_with_the_evidence(variant):
    version, added, dropped, called = ADDED[variant]
    shapes, _ = expected_tensors(LAYOUTS[version])
    shapes = {n: s for n, s in shapes.items() if n not in dropped} | dict.fromkeys(added, (4, 4))
    with pytest.raises(LayoutError, match=called):
        detect_layout(shapes)
    identity = identify(shapes, {}, None)
    assert identity.layout is None and called in identity.reason
    assert not added or set(added) & set(identity.evidence)


def test_a_file_converted_by_chatrwkv_is_named(tmp_path):
    shapes, _ = expected_tensors(LAYOUTS["6.0"])
    tensors = {n: torch.zeros(s) for n, s in shapes.items() if ".ln0." not in n}
    torch.save(tensors | {"_strategy": "cpu fp32", "_version": "0.7", "_rescale_layer": 0}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as ck:
        assert (ck.kind, ck.layout, ck.evidence) == ("converted", None, ("_strategy",))
        assert "ChatRWKV" in ck.reason


STATE = {f"blocks.{i}.att.time_state": (4, 4, 4) for i in range(2)}
LORA = {"blocks.0.att.key.lora_A": (2, 16), "blocks.0.att.key.lora_B": (16, 2)}
KINDS = [
    ("state", STATE),
    ("state", {"module." + n: s for n, s in STATE.items()}),
    ("lora", LORA | {"blocks.0.ln1.weight": (16,)}),
    ("lora", {"base_model.model.blocks.0.att.key.lora_A.weight": (2, 16)}),
    ("pissa-init", {"model.blocks.0.att.key.init_lora_A": (2, 16), "model.blocks.0.att.key.init_lora_B": (16, 2)}),
    ("miss", {"blocks.0.att.key.disha": (2, 16)}),
    ("miss", {"blocks.0.att.key.bone": (2, 16)}),
    ("miss", {"base_model.model.blocks.0.att.key.miss_block": (2, 16)}),
    ("partial", {"blocks.0.att.x_r": (1, 1, 16), "head.weight": (11, 16)}),
    ("unknown", {"transformer.h.0.attn.weight": (4, 4)}),
    ("unsupported", {"model.layers.0.attn.x_r": (1, 1, 4), "model.embeddings.weight": (4, 4)}),
    ("unknown", {}),
]


@pytest.mark.parametrize(("kind", "shapes"), KINDS)
def test_kinds(kind, shapes):
    identity = identify(shapes, {}, None)
    assert (identity.kind, identity.layout) == (kind, None)
    assert identity.reason


def test_an_adapter_folder_is_what_its_config_says():
    for said, kind in [("LORA", "lora"), ("MISS", "miss"), ("BONE", "bone"), (None, "none"), ("", "unknown")]:
        assert identify({"x": (1,)}, {}, {"peft_type": said}).kind == kind
    assert identify({"x": (1,)}, {}, {}).kind == "unknown"


def test_parameters_of_released_models():
    """Names and counts of the released 0.4B and of one trained elsewhere (rwkv_facts §1.5, §11)."""
    layout = Layout("7.0", 24, 1024, 1024, 4096, 65536, 16, 64, {"w": 64, "a": 64, "v": 32, "g": 128})
    required, optional = expected_tensors(layout)
    unused = [n for n in optional if "time_state" not in n]
    assert len(required) == 4 + 2 + 33 * 24 - 3 and len(unused) == 3
    count = sum(torch.Size(s).numel() for s in required.values())
    assert count == 450_767_872
    assert count + sum(torch.Size(optional[n]).numel() for n in unused) == 450_834_432
    assert str(SEVEN) == (
        "RWKV-7.0: 2 layers, n_embd 16, 4 heads of 4, dim_ffn 64, vocabulary 11, ranks w 4 a 3 v 2 g 5"
    )


def test_heads_that_were_flattened_away_are_not_guessed():
    layout = replace(SEVEN, n_embd=768, dim_att=768, n_head=12, head_size=64)
    shapes, _ = expected_tensors(layout)
    shapes["blocks.0.att.r_k"] = (768,)
    with pytest.raises(LayoutError, match="flattened"):
        detect_layout(shapes)


def test_a_gap_between_layers_is_named():
    shapes, _ = expected_tensors(replace(SEVEN, n_layer=4))
    with pytest.raises(LayoutError, match=r"blocks\.2\.\* is missing"):
        detect_layout({n: s for n, s in shapes.items() if not n.startswith("blocks.2.")})
