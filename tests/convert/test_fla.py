"""What fla's own classes make of a converted folder's configuration: the same tensors, in the same shapes."""

import json

import pytest
import torch
from random_models import make_layout, write_model
from safetensors.torch import load_file

from rwkv_lab.convert import convert

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("einops", reason="einops is not installed")
pytest.importorskip("fla.models.rwkv6", reason="flash-linear-attention is not installed")

WIDE, ONE = {"n_head": 3, "n_embd": 32}, {"n_layer": 1}
CASES = [(version, sizes) for version in ("6.0", "7.0") for sizes in ({}, {"head_size": 64})] + [("6.0", WIDE)]


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore")  # of fla, about itself
@pytest.mark.parametrize(("version", "sizes"), CASES, ids=str)
def test_fla_has_the_same_tensors(version, sizes, tmp_path):
    from fla.models import RWKV6Config, RWKV6ForCausalLM, RWKV7Config, RWKV7ForCausalLM

    if version == "6.0":
        config_class, model_class = RWKV6Config, RWKV6ForCausalLM
    else:
        config_class, model_class = RWKV7Config, RWKV7ForCausalLM
    source = write_model(tmp_path / "m.pth", make_layout(version, **sizes))
    folder = convert(source, "fla", tmp_path / "out").out
    config, written = config_class.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = model_class(config)
    assert shapes(model.state_dict()) == shapes(load_file(folder / "model.safetensors"))
    for name in ("num_heads", "hidden_size", "norm_eps", "fuse_norm", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == written[name], name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("sizes", "error"), [(WIDE, AssertionError), (ONE, ZeroDivisionError)], ids=str)
def test_what_fla_cannot_hold_is_noted(sizes, error, tmp_path):
    from fla.models import RWKV7Config, RWKV7ForCausalLM

    result = convert(write_model(tmp_path / "m.pth", make_layout("7.0", **sizes)), "fla", tmp_path / "out")
    assert any("rwkv7-hf takes it" in note for note in result.notes)
    with pytest.raises(error), torch.device("meta"):
        RWKV7ForCausalLM(RWKV7Config.from_pretrained(result.out))
