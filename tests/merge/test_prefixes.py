"""What wrappers put before names (DDP, torch.compile, DeepSpeed, peft) is taken off, in every role and every reader."""

import pytest
import torch
from models import random_lora, random_model, random_state, same
from pairwise import each
from random_models import make_layout, make_tokens, random_tensors
from torch import nn

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.errors import LayoutError
from rwkv_lab.merge import verify_merge
from rwkv_lab.peft import open_adapter

PREFIXES = [
    "model.",
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "base_model.model.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "_forward_module.module.model.",
    "base_model.model._orig_mod.module.model.module.",
]
EMB = "emb.weight"


def saved(path, tensors, prefix=""):
    torch.save({prefix + n: t for n, t in tensors.items()}, path)
    return path


def merged(base, tuned, out, **given):
    result = merge(base, tuned, out, overwrite=True, **given)
    assert all(c.passed for c in (*result.checks, *verify_merge(result)))
    return torch.load(out, weights_only=True), result.plan.notes


@pytest.mark.parametrize(("kind", "prefix"), each(["state", "fine-tune", "lora"], PREFIXES))
def test_a_prefix_in_base_and_in_tuned_changes_nothing(tmp_path, kind, prefix):
    base, given = random_model(), {"alpha": 8.0} if kind == "lora" else {}
    tuned = {"state": random_state, "fine-tune": lambda: random_model(seed=7), "lora": random_lora}[kind]()
    wanted, notes = merged(
        saved(tmp_path / "b.pth", base), saved(tmp_path / "t.pth", tuned), tmp_path / "o.pth", **given
    )
    assert not any("prefix" in note for note in notes)
    for i, (before, after) in enumerate([(prefix, ""), ("", prefix), (prefix, "module.")]):
        paths = saved(tmp_path / f"b{i}.pth", base, before), saved(tmp_path / f"t{i}.pth", tuned, after)
        found, notes = merged(*paths, tmp_path / "o.pth", **given)
        assert list(found) == list(wanted) and all(same(found[n], wanted[n]) for n in wanted)
        for path, there, tensors in zip(paths, (before, after), (base, tuned), strict=True):
            said = f"{path.name}: the prefix {there} was taken off {len(tensors)} of its {len(tensors)} names."
            assert (said in notes) == bool(there)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_reader_sees_through_a_prefix(tmp_path, prefix):
    tensors = random_tensors(make_layout("7.0"), time_state=True)
    plain, path = saved(tmp_path / "a.pth", tensors), saved(tmp_path / "b.pth", tensors, prefix)
    with open_checkpoint(path) as ck:
        assert ck.kind == "model" and ck.identity.prefix == prefix and list(ck) == list(tensors)
        assert same(ck[EMB], tensors[EMB]) and list(ck.stored) == [prefix + n for n in tensors]
    tokens = make_tokens(1, 5)
    models = [RWKV_Dual.from_pretrained(p) for p in (plain, path)]
    assert torch.equal(*(m(tokens)[0] for m in models))
    states = {n: t for n, t in tensors.items() if n.endswith("time_state")}
    models[0].create_state(1, tuned=saved(tmp_path / "s.pth", states, prefix))
    lora = saved(tmp_path / "l.pth", random_lora(), prefix)
    with open_adapter(lora, alpha=2.0) as adapter:
        assert {n for n in adapter.tensors() if "lora" in n} <= set(random_lora())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch itself, when it compiles
def test_wrappers_as_the_programs_themselves_name_them(tmp_path):
    """torch.compile around the whole model, around one layer, and DataParallel around that."""
    tensors = random_tensors(make_layout("7.0"))
    model = RWKV_Dual.from_pretrained(saved(tmp_path / "plain.pth", tensors))
    model.blocks[0] = torch.compile(model.blocks[0])
    wrapped = nn.DataParallel(torch.compile(model))
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pth")
    names = list(torch.load(tmp_path / "wrapped.pth", weights_only=True))
    assert any(n.startswith("module._orig_mod.blocks.0._orig_mod.") for n in names)
    with open_checkpoint(tmp_path / "wrapped.pth") as ck:
        assert ck.kind == "model" and sum(ck.prefixes.values()) == len(ck)
        assert all(same(ck[n], t) for n, t in tensors.items())
    tuned = {n: t + 1 for n, t in tensors.items()}
    found, notes = merged(tmp_path / "wrapped.pth", saved(tmp_path / "t.pth", tuned), tmp_path / "o.pth")
    assert all(same(found[n], t) for n, t in tuned.items()) and len(notes) >= 2


def test_a_name_that_arises_twice_is_refused_with_both(tmp_path):
    path = saved(tmp_path / "x.pth", random_model() | {"module._orig_mod.emb.weight": torch.ones(2, 2)})
    says = r"x\.pth: emb.weight and module._orig_mod.emb.weight are the same tensor, emb.weight"
    for read in (open_checkpoint, RWKV_Dual.from_pretrained, lambda p: merge(p, p, tmp_path / "o.pth")):
        with pytest.raises(LayoutError, match=says):
            read(path)


def test_names_of_hugging_face_are_no_prefixed_ones(tmp_path):
    path = saved(
        tmp_path / "x.pth", {"model.layers.0.attn.r_proj.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2)}
    )
    with open_checkpoint(path) as ck:
        assert not ck.prefixes and ck.kind == "partial" and ck.foreign_format.name == "fla-rwkv7"
