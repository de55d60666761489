"""What is written is read by the programs that it is written for: transformers and rwkv7-hf give our logits."""

import json
import subprocess

import pytest
import torch
from random_models import make_layout, make_tokens, random_tensors, relative_rms, write_model

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert, to_huggingface, to_pth

LIMIT = 2e-5  # relative RMS in float32: two implementations of the same formulas
TOKENS = make_tokens(2, 37)


def our_logits(path, eps=None):
    return RWKV_Dual.from_pretrained(path, group_norm_eps=eps).requires_grad_(False)(TOKENS)[0]


def continued(model, prompt, count):
    """Greedy, by us."""
    ids = prompt.clone()
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture(scope="module")
def rwkv7_hf():
    pytest.importorskip("rwkv7_hf", reason="the PyPI package rwkv7-hf is not installed")
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    return RWKV7ForCausalLM


def loaded(reader, folder):
    model, info = reader.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
class TestRwkv4InTransformers:
    @pytest.fixture(scope="class", params=[2, 13])
    @classmethod
    def pair(cls, request, tmp_path_factory):
        """(the model as we read it, as transformers reads it)"""
        RwkvForCausalLM = pytest.importorskip("transformers", reason="transformers is not installed").RwkvForCausalLM
        folder = tmp_path_factory.mktemp("rwkv4")
        path = write_model(folder / "m.pth", make_layout("4.0", n_layer=request.param))
        return path, loaded(RwkvForCausalLM, to_huggingface(path, folder / "out").out), folder

    def test_logits(self, pair):
        path, theirs, _ = pair
        assert relative_rms(theirs(TOKENS).logits, our_logits(path)) < LIMIT

    def test_generate(self, pair):
        path, theirs, _ = pair
        ours = RWKV_Dual.from_pretrained(path).requires_grad_(False)
        found = theirs.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(found, continued(ours, TOKENS[:1, :5], 8))

    def test_one_token_after_the_other(self, pair):
        path, theirs, _ = pair
        expected, out = our_logits(path), theirs(TOKENS[:1, :10], use_cache=True)
        for t in range(10, 14):
            out = theirs(TOKENS[:1, t : t + 1], state=out.state, use_cache=True)
            assert relative_rms(out.logits[0, 0], expected[0, t]) < LIMIT

    def test_what_transformers_saves_opens_again(self, pair):
        path, theirs, folder = pair
        theirs(TOKENS)  # in evaluation, which halves weights where the configuration says so
        theirs.save_pretrained(folder / "saved")
        to_pth(folder / "saved", folder / "saved.pth", overwrite=True)
        saved, source = (torch.load(f, weights_only=True) for f in (folder / "saved.pth", path))
        assert set(saved) == set(source) and all(torch.equal(saved[n], source[n]) for n in source)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_layer", [7, 13])
def test_weights_that_transformers_has_halved_are_read_as_they_were(n_layer, tmp_path):
    RwkvForCausalLM = pytest.importorskip("transformers", reason="transformers is not installed").RwkvForCausalLM
    path = write_model(tmp_path / "m.pth", make_layout("4.0", n_layer=n_layer))
    folder = to_huggingface(path, tmp_path / "out").out
    theirs = RwkvForCausalLM.from_pretrained(folder, rescale_every=6)
    theirs.save_pretrained(tmp_path / "before")
    theirs.eval()(TOKENS)
    theirs.save_pretrained(tmp_path / "after")
    source = torch.load(path, weights_only=True)
    for name, halved in (("before", False), ("after", True)):
        result = to_pth(tmp_path / name, tmp_path / f"{name}.pth")
        assert any("halved after every 6 layers" in note for note in result.notes) == halved
        found = torch.load(result.out, weights_only=True)
        assert all(torch.equal(found[n], source[n]) for n in source)
    assert relative_rms(our_logits(tmp_path / "after"), our_logits(path)) == 0


@pytest.mark.filterwarnings("ignore")
class TestRwkv7InRwkv7Hf:
    SIZES = (
        {"head_size": 64},
        {"head_size": 64, "n_head": 1},
        {"head_size": 64, "n_layer": 1},
        {"head_size": 64, "n_head": 3, "n_embd": 64, "n_layer": 3},  # attention wider than the model
        {"head_size": 32},
        {"head_size": 128},
    )

    @pytest.fixture(scope="class", params=SIZES, ids=str)
    @classmethod
    def pair(cls, request, tmp_path_factory, rwkv7_hf):
        folder, layout = tmp_path_factory.mktemp("rwkv7"), make_layout("7.0", **request.param)
        path = write_model(folder / "m.pth", layout)
        result = to_huggingface(path, folder / "out")
        return path, loaded(rwkv7_hf, result.out), result

    def test_logits(self, pair):
        path, theirs, result = pair
        eps = result.plan.layout.head_size * 1e-5  # their rule
        assert relative_rms(theirs(TOKENS).logits, our_logits(path, eps)) < LIMIT
        assert any("norm over heads" in note for note in result.notes) == (result.plan.layout.head_size != 64)

    def test_logits_with_the_eps_that_the_plan_names(self, pair):
        """What the note says to set after loading: then they are BlinkDL's at any head size."""
        path, theirs, result = pair
        norms = [layer.attn.g_norm for layer in theirs.model.layers]
        before = norms[0].eps
        try:
            for norm in norms:
                norm.eps = 64e-5
            assert relative_rms(theirs(TOKENS).logits, our_logits(path)) < LIMIT
        finally:
            for norm in norms:
                norm.eps = before
        other_eps = relative_rms(theirs(TOKENS).logits, our_logits(path))
        assert (other_eps > LIMIT) == (result.plan.layout.head_size != 64) and other_eps < 0.05

    def test_generate(self, pair):
        path, theirs, result = pair
        ours = RWKV_Dual.from_pretrained(path, group_norm_eps=result.plan.layout.head_size * 1e-5).requires_grad_(False)
        found = theirs.generate(TOKENS[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(found, continued(ours, TOKENS[:1, :5], 8))

    def test_the_configuration_is_complete(self, pair):
        _, theirs, result = pair
        layout, config = result.plan.layout, json.loads((result.out / "config.json").read_text())
        assert theirs.config.num_heads == config["num_heads"] == config["num_attention_heads"] == layout.n_head
        assert theirs.config.head_dim == layout.head_size and theirs.config.intermediate_size == layout.dim_ffn
        assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (0, 0, 0)
        ranks = [config[f"{name}_low_rank_dim"] for name in ("decay", "a", "gate")]
        assert ranks == [layout.ranks[name] for name in "wag"]
        assert config["dtype"] == "float32" and config["norm_eps"] == 1e-5 and not config["tie_word_embeddings"]


@pytest.mark.filterwarnings("ignore")
def test_layer_0_may_have_the_tensors_that_nothing_reads(tmp_path, rwkv7_hf):
    layout = make_layout("7.0", head_size=64)
    tensors = random_tensors(layout)
    for name in ("v0", "v1", "v2"):
        tensors[f"blocks.0.att.{name}"] = torch.randn_like(tensors[f"blocks.1.att.{name}"])
    write_checkpoint(tmp_path / "m.pth", tensors)
    result = convert(tmp_path / "m.pth", "fla", tmp_path / "out")
    assert sorted(d.name[-2:] for d in result.dropped) == ["v0", "v1", "v2"]
    theirs = loaded(rwkv7_hf, tmp_path / "out")
    assert relative_rms(theirs(TOKENS).logits, our_logits(tmp_path / "m.pth")) < LIMIT


def test_what_rwkv7_hf_converts_is_the_same(warm, tmp_path, rwkv7_hf):
    path = write_model(tmp_path / "m.pth", make_layout("7.0", head_size=64, dim_ffn=128))
    words = ["--input", str(path), "--output", str(tmp_path / "theirs"), "--precision", "fp32"]
    command = [warm.python, "-m", "rwkv7_hf.cli", "convert", *words]
    subprocess.run(command, check=True, capture_output=True, env=warm.environment)
    ours = to_huggingface(path, tmp_path / "ours").out
    with open_checkpoint(tmp_path / "theirs") as a, open_checkpoint(ours) as b:
        assert set(a.names_in_file.items()) == set(b.names_in_file.items())
        assert all(torch.equal(a[n], b[n]) for n in b)
        differ = {k for k in a.config.keys() & b.config.keys() if a.config[k] != b.config[k]}
    assert differ <= {"transformers_version", "bos_token_id"}, differ  # they say 1, which is a byte


@pytest.mark.filterwarnings("ignore")
def test_folders_load_as_our_models(tmp_path):
    for version in ("4.0", "5.2", "6.0", "7.0"):
        path = write_model(tmp_path / "m.pth", make_layout(version, head_size=64))
        folder = to_huggingface(path, tmp_path / version).out
        assert torch.equal(our_logits(folder), our_logits(path))
        with open_checkpoint(folder) as ck:
            assert ck.config["vocab_size"] == 70


class TestRwkv6InFla:
    """fla's own code needs a GPU to run, so its formulas for the mixes are written here once more, from its layout."""

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory):
        """(the model's tensors, those of the folder)"""
        from safetensors.torch import load_file

        folder, layout = tmp_path_factory.mktemp("rwkv6"), make_layout("6.0")
        result = convert(write_model(folder / "m.pth", layout), "fla", folder / "out")
        return random_tensors(layout), load_file(result.out / "model.safetensors"), result

    def test_the_mixes_are_the_same(self, pair):
        ours, theirs, result = pair
        x, delta = torch.randn(2, 3, 32).unbind(0)
        o, t = "blocks.1.att.", "model.layers.1.attn."
        inner = torch.tanh((x + delta * ours[o + "time_maa_x"][0]) @ ours[o + "time_maa_w1"]).view(3, 5, -1)
        mixes = torch.einsum("tnd,ndc->tnc", inner, ours[o + "time_maa_w2"])
        expected = {z: mixes[:, i] + ours[o + f"time_maa_{z}"].view(-1) for i, z in enumerate("wkvrg")}
        inner = torch.tanh((x + delta * theirs[t + "x_proj.0.mu"]) @ theirs[t + "x_proj.0.linear.weight"].t())
        wide = theirs[t + "x_proj.2.weight"].view(32, 5, -1)
        found = torch.einsum("tnd,cnd->tnc", inner.view(3, 5, -1), wide) + theirs[t + "x_bias"]
        for i, z in enumerate("rwkvg"):
            torch.testing.assert_close(found[:, i], expected[z])

    def test_the_decay_is_the_same(self, pair):
        ours, theirs, _ = pair
        x, o, t = torch.randn(3, 32), "blocks.0.att.", "model.layers.0.attn.w_proj.linear.lora."
        expected = (
            ours[o + "time_decay"].view(-1) + torch.tanh(x @ ours[o + "time_decay_w1"]) @ ours[o + "time_decay_w2"]
        )
        found = torch.tanh(x @ theirs[t + "0.weight"].t()) @ theirs[t + "2.weight"].t() + theirs[t + "2.bias"]
        torch.testing.assert_close(found, expected)

    def test_shapes_and_configuration(self, pair):
        _, theirs, result = pair
        config = json.loads((result.out / "config.json").read_text())
        C, A, H = config["hidden_size"], int(config["hidden_size"] * config["expand_k"]), config["num_heads"]
        D, DD, F = config["proj_low_rank_dim"], config["gate_low_rank_dim"], config["intermediate_size"]
        attn, ffn = "model.layers.0.attn.", "model.layers.0.ffn."
        expected = {
            "x_proj.0.linear.weight": (5 * D, C), "x_proj.0.mu": (C,), "x_proj.2.weight": (C, 5 * D), "x_bias": (5, C),
            "w_proj.linear.lora.0.weight": (DD, C), "w_proj.linear.lora.2.weight": (A, DD), "bonus": (H, A // H),
            "w_proj.linear.lora.2.bias": (A,), "g_norm.weight": (A,), "o_proj.weight": (C, A),
            **{f"{z}_proj.linear.weight": (A, C) for z in "rkvg"},
        }  # fmt: skip
        assert {n: tuple(theirs[attn + n].shape) for n in expected} == expected
        assert theirs[ffn + "key.linear.weight"].shape == (F, C) and theirs[ffn + "key.mu"].shape == (C,)
        assert (config["bos_token_id"], config["eos_token_id"], config["group_norm_eps"]) == (0, 0, 64e-5)


@pytest.mark.parametrize("version", ["5.2", "6.0"])
def test_world_folders(version, tmp_path):
    layout = make_layout(version)
    result = to_huggingface(write_model(tmp_path / "m.pth", layout), tmp_path / "out")
    config = json.loads((result.out / "config.json").read_text())
    assert config["model_type"] == f"rwkv{version[0]}" and config["head_size"] == 16
    assert config["intermediate_size"] == 52 and config["attention_hidden_size"] == 32
    names = {row.name for row in result.plan.rows if row.name.startswith("rwkv.blocks.1.attention.time_")}
    if version == "5.2":
        assert names == {f"rwkv.blocks.1.attention.time_{n}" for n in
                         ("decay", "faaaa", "mix_key", "mix_value", "mix_receptance", "mix_gate")}  # fmt: skip
    else:
        assert names >= {f"rwkv.blocks.1.attention.time_maa_{z}" for z in ("x", "w", "w1", "w2")}
    assert all(row.action == "copy" for row in result.plan.rows)
    assert torch.equal(our_logits(result.out), our_logits(tmp_path / "m.pth"))


def test_the_plan_says_what_transformers_does_to_batches(tmp_path):
    path = write_model(tmp_path / "m.pth", make_layout("4.0"))
    notes = convert(path, "transformers", tmp_path / "out", dry_run=True).plan.notes
    assert any("one text at a time" in note.lower() for note in notes)
