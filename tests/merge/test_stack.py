"""Layers put on one another: every tensor of the output is one of a source, at another place."""

import pytest
import torch
from models import LAYOUTS, random_model, random_state, same

from rwkv_lab import RWKV_Dual, merge, open_checkpoint
from rwkv_lab.checkpoint import Layout, write_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError
from rwkv_lab.merge import verify_merge

SEVEN = Layout("7.0", 3, 16, 16, 64, 11, 4, 4, LAYOUTS["7.0"].ranks)


def deep(layout: Layout, n_layer: int) -> Layout:
    return Layout(**{**vars(layout), "n_layer": n_layer})


@pytest.fixture
def stack(tmp_path):
    def stacked(layers, *models, **given):
        for i, tensors in enumerate(models):
            torch.save(tensors, tmp_path / f"{i}.pth")
        tuned = [tmp_path / f"{i}.pth" for i in range(1, len(models))]
        out = tmp_path / "out.pth"
        parameters = {"layers": layers}
        return merge(
            tmp_path / "0.pth", tuned, out, method="passthrough", overwrite=True, parameters=parameters, **given
        )

    return stacked


@pytest.mark.parametrize("suffix", ["", "bf16"])
@pytest.mark.parametrize("version", list(LAYOUTS))
def test_two_models_of_unequal_depth(version, suffix, stack):
    one, two = random_model(deep(LAYOUTS[version], 3), torch.float32), random_model(deep(LAYOUTS[version], 4), seed=1)
    given = {"dtype": "bf16"} if suffix else {}
    result = stack(["base[0:3]", "tuned[1:3]", "base[2:3]"], one, two, **given)
    checks = [*result.checks, *verify_merge(result)]
    assert all(c.passed for c in checks), [str(c) for c in checks]
    assert result.plan.layout.n_layer == 6 and result.plan.output_bytes == result.out.stat().st_size
    with open_checkpoint(result.out) as ck:
        assert ck.kind == "model" and ck.layout.n_layer == 6 and ck.layout.version == version
    found = torch.load(result.out, weights_only=True)
    origin = {0: (one, 0), 1: (one, 1), 2: (one, 2), 3: (two, 1), 4: (two, 2), 5: (one, 2)}
    for name, tensor in found.items():
        source = one
        if name.startswith("blocks."):
            _, place, rest = name.split(".", 2)
            source, i = origin[int(place)]
            name = f"blocks.{i}.{rest}"
        assert same(tensor, source[name].bfloat16() if suffix else source[name])
    if not suffix:
        state = RWKV_Dual.from_pretrained(result.out).parallel(torch.arange(5)[None])
        assert bool(state[0].isfinite().all())


def test_what_lies_below_comes_from_the_first_and_above_from_the_last(stack):
    one, two = random_model(SEVEN), random_model(SEVEN, seed=1)
    found = torch.load(stack(["tuned[0:2]", "base[1:3]"], one, two).out, weights_only=True)
    assert same(found["emb.weight"], two["emb.weight"]) and same(found["head.weight"], one["head.weight"])
    assert same(found["blocks.0.ln0.weight"], two["blocks.0.ln0.weight"])


def test_a_model_alone_and_its_states(stack, tmp_path):
    one = random_model(SEVEN, unused=True) | random_state(SEVEN)
    result = stack(["base[0:3]", "base[1:3]"], one)
    assert all(c.passed for c in verify_merge(result))
    found = torch.load(result.out, weights_only=True)
    assert same(found["blocks.4.att.time_state"], one["blocks.2.att.time_state"])
    assert same(found["blocks.0.att.v1"], one["blocks.0.att.v1"])
    assert len(result.plan.changed) == sum(n.startswith(("blocks.3.", "blocks.4.")) for n in found)
    assert any("v_first" in note for note in result.plan.notes)


def test_layer_0_of_6_may_stand_above_and_leaves_its_ln0(stack):
    one = random_model(LAYOUTS["6.0"])
    result = stack(["base[0:2]", "base[0:1]"], one)
    assert all(c.passed for c in verify_merge(result))
    found = torch.load(result.out, weights_only=True)
    assert same(found["blocks.2.att.key.weight"], one["blocks.0.att.key.weight"]) and "blocks.2.ln0.weight" not in found


@pytest.mark.parametrize(
    ("layers", "error", "said"),
    [
        (["base[1:3]"], LayoutError, "layer 1; only a layer 0 has ln0, and v_first"),
        (["base[0:3]", "tuned[0:2]"], LayoutError, "layer 3 of the output would be a layer 0"),
        (["base[0:4]"], ParameterError, "layers 0 to 2"),
        (["base[2:2]"], ParameterError, "first:after the last"),
        (["tuned2[0:1]"], ParameterError, "one tuned model is given, called tuned"),
        (["base 0-3"], ParameterError, "not a run of layers"),
        ([], ParameterError, "needs parameters"),
        (None, ParameterError, "needs parameters"),
        ("base[0:3]", ParameterError, "needs parameters"),
    ],
)
def test_stacks_that_make_no_sense(layers, error, said, stack):
    with pytest.raises(error, match=said) as caught:
        stack(layers, random_model(SEVEN), random_model(SEVEN, seed=1))
    assert str(caught.value).count("\n") < 3


def test_models_that_do_not_fit(stack):
    one = random_model(SEVEN)
    for other, said in [
        (random_model(LAYOUTS["6.0"]), "is RWKV-6.0"),
        (random_model(Layout("7.0", 2, 32, 32, 64, 11, 8, 4, SEVEN.ranks)), "n_embd differs"),
        (random_model(Layout("7.0", 2, 16, 16, 64, 11, 4, 4, dict(SEVEN.ranks) | {"g": 6})), r"att.g1 .*\[16, 6\]"),
        (random_state(SEVEN), "whole models"),
        (random_model(SEVEN, seed=1) | {"more": torch.ones(1)}, "does not know"),
    ]:
        with pytest.raises(LayoutError, match=said):
            stack(["base[0:3]", "tuned[1:2]"], one, other)
    for given, said in [({"alpha": 0.5}, "takes no alpha"), ({"include": ["emb*"]}, "new model")]:
        with pytest.raises(ParameterError, match=said):
            stack(["base[0:3]"], one, **given)


def test_a_plan_counts_layers_where_tensors_say_little(tmp_path):
    base, tuned = tmp_path / "base.pth", tmp_path / "tuned.pth"
    write_checkpoint(base, random_model())
    write_checkpoint(tuned, random_model(seed=1))

    def notes(*layers: str, of=tuned) -> tuple[str, ...]:
        given = {"method": "passthrough", "parameters": {"layers": [*layers]}}
        return tuple(merge(base, of, tmp_path / "o.pth", dry_run=True, **given).plan.notes)

    assert "The output has 3 layers: 2 from base.pth (2 of its 2), 1 from tuned.pth (1 of its 2)." in notes(
        "base[0:2]", "tuned[1:2]"
    )
    assert "The output has 3 layers: 3 from base.pth (2 of its 2)." in notes("base[0:2]", "base[1:2]", of=[])
    assert notes("base[0:1]", of=[]) == ("The output has 1 layer: 1 from base.pth (1 of its 2).",)
