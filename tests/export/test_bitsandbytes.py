"""Models of Hugging Face in 8 and 4 bits by bitsandbytes itself: as they are loaded, and as they are exported."""

from pathlib import Path

import pytest
import torch
from causal_lm import write_model

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from rwkv_lab.export import ConfigurationManager, ModelMerger, run

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and bitsandbytes
IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """mlp.down_proj has 96 inputs, which bitsandbytes does not compute in 4 bits on every processor."""
    return write_model(tmp_path_factory.mktemp("qwen3") / "base", num_hidden_layers=1, tie_word_embeddings=True)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def test_a_base_is_loaded_in_8_and_4_bits(base):
    load = ModelMerger().load_base_model
    plain = logits(load(base).load())
    scale = float(plain.abs().max())
    for quantisation, kind, limit in (("8bit", "Linear8bitLt", 0.03), ("4bit", "Linear4bit", 0.3)):
        model = load(base, quantisation).load()
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == kind
        down = type(model.model.layers[0].mlp.down_proj).__name__
        assert down == ("Linear" if quantisation == "4bit" else kind)
        assert 1e-4 < float((logits(model) - plain).abs().max()) / scale < limit


def test_an_exported_folder_in_nf4_is_what_transformers_makes(base, tmp_path):
    from transformers import AutoModelForCausalLM

    asked = dict(checkpoint_path=base, output_directory=tmp_path, naming_pattern="x", quantization_level="nf4")
    result = run(ConfigurationManager(environment={}).resolve(**asked, export_onnx=False))
    loaded = AutoModelForCausalLM.from_pretrained(result.pytorch_model_path)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    expected = ModelMerger().load_base_model(base, "4bit").load()
    assert torch.equal(logits(loaded), logits(expected))
