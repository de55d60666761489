"""`ModelMerger`: what it writes computes what peft's base with adapter computes, whatever the adapter is made of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_lm import edit_json, write_adapter, write_model
from random_models import make_layout
from random_models import write_model as write_rwkv
from tuned_files import write_adapter as write_rwkv_adapter

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from rwkv_lab import open_checkpoint
from rwkv_lab.errors import ModelMergeError, OutputError
from rwkv_lab.export import ModelMerger
from rwkv_lab.export.causal_lm.loading import four_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of transformers and peft
merger = ModelMerger()
BASES = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "shard": "40KB"},
    "biased": {"tie_word_embeddings": False, "attention_bias": True},
    "bfloat16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "llama": {"config": "LlamaConfig", "tie_word_embeddings": False},
}
ADAPTERS = {  # (base, settings of peft, whether the head becomes a tensor of its own)
    "lora": ("untied", {}, False),
    "rslora": ("tied", {"use_rslora": True}, False),
    "dora": ("tied", {"use_dora": True}, False),
    "patterns": ("tied", {"rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {"v_proj": 5}}, False),
    "half": ("bfloat16", {}, False),
    "dora-bfloat16": ("bfloat16", {"use_dora": True}, False),
    "all-linear": ("llama", {"target_modules": "all-linear"}, False),
    "bias": ("biased", {"bias": "all"}, False),
    "lora-bias": ("biased", {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}, False),
    "lora-only": ("biased", {"bias": "lora_only", "target_modules": ["o_proj"]}, False),
    "tied-head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, True),
    "tied-embedding": ("tied", {"target_modules": ["embed_tokens"]}, True),
    "tied-both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, True),
    "untied-both": ("untied", {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "saved-head": ("tied", {"modules_to_save": ["lm_head"]}, True),
    "saved-embedding": ("tied", {"modules_to_save": ["embed_tokens"]}, True),
    "saved-norm": ("untied", {"modules_to_save": ["norm", "lm_head"]}, False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_model(path, **BASES[name])

    return make


def merged_by_us(base: Path, adapter: Path, out: Path):
    planned = merger.merge_lora_weights(merger.load_base_model(base), merger.load_lora_adapter(adapter))
    return merger.save_merged_model(planned, out)


def logits_by_peft(base: Path, adapter: Path) -> np.ndarray:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(peft.PeftModel.from_pretrained(model, adapter).eval())


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20) * 7 % 259).logits.numpy()


def loaded(folder: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_model_computes_what_peft_does(base, tmp_path, name):
    kind, settings, untied = ADAPTERS[name]
    adapter = write_adapter(tmp_path / "adapter", base(kind), **settings)
    merged = merged_by_us(base(kind), adapter, tmp_path / "merged")
    expected, found = logits_by_peft(base(kind), adapter), logits(loaded(merged.path))
    change = np.abs(expected - logits(loaded(base(kind)))).max()
    limit = 0.05 * change if kind == "bfloat16" else 1e-5
    assert np.abs(found - expected).max() < limit < change / 10
    assert (json.loads((merged.path / "config.json").read_text())["tie_word_embeddings"] is False) is (
        untied or kind not in ("tied", "bfloat16")
    )
    assert any("tensor of its own" in note for note in merged.notes) is untied
    checks = merger.verify_merge_integrity(merged)
    assert len(checks) == 4 and all(check.passed for check in checks), "\n".join(map(str, checks))


def test_weights_that_store_inputs_first_are_merged(tmp_path):  # GPT-2's Conv1D
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    base = write_model(tmp_path / "base", "GPT2Config", **sizes)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["c_attn"], fan_in_fan_out=True)
    merged = merged_by_us(base, adapter, tmp_path / "merged")
    assert np.abs(logits(loaded(merged.path)) - logits_by_peft(base, adapter)).max() < 1e-5
    assert all(check.passed for check in merger.verify_merge_integrity(merged))


def test_the_merged_folder_has_tokenizer_template_and_generation_settings(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base("untied"))
    shutil.copy(base("untied") / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("the adapter's")
    merged = merged_by_us(base("untied"), adapter, tmp_path / "merged")
    found = {path.name for path in merged.path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= found
    assert (merged.path / "chat_template.jinja").read_text() == "the adapter's"
    assert merged.path.joinpath("config.json").stat().st_size and "model.safetensors" in found


def test_a_large_model_is_written_in_shards(base, tmp_path):
    planned = merger.merge_lora_weights(
        merger.load_base_model(base("untied")),
        merger.load_lora_adapter(write_adapter(tmp_path / "adapter", base("untied"))),
    )
    merged = merger.save_merged_model(planned, tmp_path / "merged", max_shard_size=60_000)
    assert len(list(merged.path.glob("model-*.safetensors"))) > 2
    assert all(check.passed for check in merger.verify_merge_integrity(merged))


def test_a_damaged_merge_does_not_stand_its_checks(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base("untied"))
    merged = merged_by_us(base("untied"), adapter, tmp_path / "merged")
    for name, failing in (("model.norm.weight", {1, 3}), ("model.layers.1.self_attn.v_proj.weight", {2, 3})):
        with open_checkpoint(merged.path) as ck:
            info = ck.stored[name]
            path, at, size = info.file.path, info.offset, info.nbytes
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + np.full(size // 4, 0.5, np.float32).tobytes() + whole[at + size :])
        checks = merger.verify_merge_integrity(merged)
        assert {i for i, check in enumerate(checks) if not check.passed} == failing
        path.write_bytes(whole)


def test_little_of_an_adapter_that_bfloat16_rounds_away_is_said(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base("bfloat16"), lora_alpha=1)
    edit_json(adapter / "adapter_config.json", lora_alpha=1e-3)
    merged = merged_by_us(base("bfloat16"), adapter, tmp_path / "merged")
    assert any("rounding takes away more than 10%" in note for note in merged.notes)


def test_an_rwkv_adapter_is_merged_through_the_same_steps(tmp_path):
    base = write_rwkv(tmp_path / "B.safetensors", make_layout("7.0", n_layer=1, head_size=32))
    adapter = write_rwkv_adapter(tmp_path / "A.pth", base, lora_r=2)
    planned = merger.merge_lora_weights(merger.load_base_model(base), merger.load_lora_adapter(adapter))
    assert planned.changed
    merged = merger.save_merged_model(planned, tmp_path / "M.pth")
    checks = merger.verify_merge_integrity(merged)
    assert checks and all(check.passed for check in checks)
    four = merger.load_base_model(base, "4bit").load()
    assert any("NF4" in type(module).__name__ for module in four.modules())


def test_the_base_can_be_loaded(base):
    whole = merger.load_base_model(base("tied")).load()
    assert np.abs(logits(whole) - logits(loaded(base("tied")))).max() < 1e-5


def test_what_bitsandbytes_does_not_compute_on_every_processor_is_kept(base):
    found = four_bits(base("tied"))
    assert {name.rpartition(".")[2] for name in found.kept} == {"down_proj", "lm_head"}  # 96 inputs: no multiple of 64
    assert {name.rpartition(".")[2] for name in found.stored} >= {"q_proj", "up_proj"}


def test_bits_need_bitsandbytes(base, monkeypatch):
    monkeypatch.setattr("rwkv_lab.export.causal_lm.loading.find_spec", lambda name: None)
    with pytest.raises(ModelMergeError, match="needs the package bitsandbytes"):
        merger.load_base_model(base("tied"), "4bit")


REFUSED_SETTINGS = {
    "peft_type": ("IA3", "LORA is merged here"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "sets target_parameters"),
    "layer_replication": ([[0, 2], [1, 2]], "sets layer_replication"),
    "alora_invocation_tokens": ([5], "sets alora_invocation_tokens"),
    "trainable_token_indices": ([5], "sets trainable_token_indices"),
    "a_setting_of_2027": (True, "sets a_setting_of_2027"),
    "init_lora_weights": ("pissa_niter_4", "changes the base before training"),
    "use_dora": (True, "states use_dora"),
    "r": (8, "has rank 4; adapter_config.json states 8"),
    "lora_alpha": ("12", "a number above 0"),
    "rank_pattern": ({"(": 2}, "no regular expression"),
    "alpha_pattern": ({r"((\w|\.)*)*!": 2}, "may take too long. Name the layers"),
    "auto_mapping": ({"base_model_class": "LlamaForCausalLM"}, "is of a LlamaForCausalLM"),
}


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("plain") / "adapter", base("untied"))


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_an_adapter_whose_effect_is_not_known_is_refused(base, plain, tmp_path, setting):
    value, message = REFUSED_SETTINGS[setting]
    shutil.copytree(plain, tmp_path / "A")
    edit_json(tmp_path / "A/adapter_config.json", **{setting: value})
    with pytest.raises(ModelMergeError, match=message):
        merged_by_us(base("untied"), tmp_path / "A", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(base, plain, tmp_path):
    narrow = write_model(tmp_path / "narrow", tie_word_embeddings=False, hidden_size=32)
    shallow = write_model(tmp_path / "shallow", tie_word_embeddings=False, num_hidden_layers=1)
    twin = write_model(tmp_path / "twin", tie_word_embeddings=False, seed=5)  # same shapes, other weights
    for other, message in ((narrow, "64"), (shallow, "has no model.layers.1"), (twin, "states that it was trained on")):
        with pytest.raises(ModelMergeError, match=message):
            merged_by_us(other, plain, tmp_path / "out")
    rounded = write_model(
        tmp_path / "rounded", tie_word_embeddings=False, dtype=torch.bfloat16
    )  # the same in fewer bits
    assert merged_by_us(rounded, plain, tmp_path / "out").path.is_dir()
    biased = write_adapter(tmp_path / "biased", base("biased"), bias="all")
    edit_json(biased / "adapter_config.json", base_model_name_or_path="elsewhere")
    with pytest.raises(ModelMergeError, match="a bias where the model has none"):
        merged_by_us(base("untied"), biased, tmp_path / "out2")
    rwkv = write_rwkv(tmp_path / "B.safetensors", make_layout("7.0", n_layer=1))
    with pytest.raises(ModelMergeError, match="of Hugging Face; .* is of RWKV"):
        merger.merge_lora_weights(merger.load_base_model(rwkv), merger.load_lora_adapter(plain))


def test_damaged_and_missing_files_are_named(base, plain, tmp_path):
    def copied(source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    shard = max(copied(base("untied"), "cut").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelMergeError, match=shard.name):
        merger.load_base_model(tmp_path / "cut")
    weights = copied(plain, "torn") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelMergeError, match="adapter_model.safetensors"):
        merger.load_lora_adapter(tmp_path / "torn")
    (copied(base("untied"), "mute") / "tokenizer.json").unlink()
    with pytest.raises(ModelMergeError, match="no tokenizer.json"):
        merged_by_us(tmp_path / "mute", plain, tmp_path / "out")
    planned = merger.merge_lora_weights(merger.load_base_model(tmp_path / "mute"), merger.load_lora_adapter(plain))
    merger.save_merged_model(planned, tmp_path / "out", tokenizer=str(base("tied") / "tokenizer.json"))
    with pytest.raises(OutputError, match="exists"):
        merger.save_merged_model(planned, tmp_path / "out", tokenizer=str(base("tied")))
    edit_json(copied(base("untied"), "packed") / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelMergeError, match="is quantised .bitsandbytes."):
        merger.load_base_model(tmp_path / "packed")
    with pytest.raises(ModelMergeError, match="no adapter of peft"):
        merger.load_lora_adapter(base("untied"))
    with pytest.raises(ModelMergeError, match="no model that adapters"):
        merger.load_base_model(plain)
