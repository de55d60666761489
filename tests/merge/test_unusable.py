"""What people give by mistake, made the way the tools make it, is refused by name with what to do, by every reader."""

import pytest
import torch
from models import random_lora, random_model
from random_models import make_layout, make_tokens, random_tensors
from safetensors.torch import save_file

from rwkv_lab import RWKV_Dual, init_state_with_past, merge, open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError, RwkvLabError, UnsafeFileError
from rwkv_lab.merge import merge_recipe
from rwkv_lab.model.state_file import save_state
from rwkv_lab.peft import open_adapter, quantise_blocks

MATRIX = "blocks.0.att.key.weight"


def saved(path, tensors):
    torch.save(tensors, path)
    return path


def refused_everywhere(path, says, tmp_path, error=LayoutError):
    """As base, as tuned, as a model and as an adapter: in at most three lines, and nothing is written."""
    base = saved(tmp_path / "sound.pth", random_model())
    state = saved(tmp_path / "lora.pth", random_lora())
    for read in (
        lambda: merge(path, state, tmp_path / "o.pth", alpha=2.0),
        lambda: merge(base, path, tmp_path / "o.pth"),
        lambda: merge(base, path, tmp_path / "o.pth", method="overlay"),
        lambda: merge(base, path, tmp_path / "o.pth", method="lora", alpha=2.0),
        lambda: merge(base, path, tmp_path / "o.pth", method="linear", weights=[1, 1]),
        lambda: RWKV_Dual.from_pretrained(path),
    ):
        with pytest.raises(error, match=says) as caught:
            read()
        assert str(caught.value).count("\n") < 3
    assert not (tmp_path / "o.pth").exists()


def four_bits(weight):
    """As Linear4bit's state_dict has it."""
    n = weight.numel()
    quant_map, absmax = torch.rand(16), torch.rand(-(-n // 64))
    state = torch.zeros(40, dtype=torch.uint8)
    parts = {".absmax": absmax, ".quant_map": quant_map, ".quant_state.bitsandbytes__nf4": state}
    return {"": torch.zeros(n // 2, 1, dtype=torch.uint8)} | parts


PACKED = {
    "4 bits by bitsandbytes": {f"{MATRIX}{k}": t for k, t in four_bits(torch.ones(16, 16)).items()},
    "8 bits by bitsandbytes": {MATRIX: torch.ones(16, 16, dtype=torch.int8), "blocks.0.att.key.SCB": torch.ones(16)},
    "few bits by GPTQ or AWQ": {
        "blocks.0.att.key.qweight": torch.ones(2, 16, dtype=torch.int32),
        "blocks.0.att.key.qzeros": torch.ones(1, 2, dtype=torch.int32),
        "blocks.0.att.key.scales": torch.ones(1, 16),
    },
    "8 bits or fewer by quanto": {
        "blocks.0.att.key.weight._data": torch.ones(16, 16, dtype=torch.int8),
        "blocks.0.att.key.weight._scale": torch.ones(16, 1),
    },
    "8 bits with scales of their own": {
        MATRIX: torch.ones(16, 16, dtype=torch.int8),
        "blocks.0.att.key.weight_scale": torch.ones(16),
    },
    "few bits by HQQ": {"blocks.0.att.key.W_q": torch.ones(8, 16, dtype=torch.uint8)},
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_weights(tmp_path, how):
    tensors = {n: t for n, t in random_model().items() if n != MATRIX} | PACKED[how]
    path = saved(tmp_path / "x.pth", {f"model.{n}": t for n, t in tensors.items()})
    refused_everywhere(path, rf"packed in {how}(.|\n)*Give the original in 16 or 32 bits", tmp_path)
    with open_checkpoint(path) as ck:
        assert ck.kind == "unusable" and ck.evidence


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_packed_weights_without_a_name_that_tells(tmp_path, dtype):
    packed = {MATRIX: torch.ones(128, 1, dtype=dtype)}
    path = saved(tmp_path / "x.pth", random_model() | packed)
    sound, lora = saved(tmp_path / "sound.pth", random_model()), saved(tmp_path / "lora.pth", random_lora())
    says = rf"{MATRIX} in .* is {dtype};(.|\n)*1 of its 69 tensors look packed in few bits: give the original"
    for given, more in (((path, lora), {"alpha": 2.0}), ((sound, path), {}), ((sound, path), {"method": "slerp"})):
        with pytest.raises(LayoutError, match=says):
            merge(*given, tmp_path / "o.pth", **more)


def test_tensors_that_fsdp_laid_out_flat(tmp_path):
    flat = {"_fsdp_wrapped_module._flat_param": torch.ones(99), "emb.weight": torch.ones(2, 2)}
    refused_everywhere(saved(tmp_path / "x.pth", flat), "FSDP(.|\n)*FULL_STATE_DICT", tmp_path)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda t: t.to_sparse(), r"sparse: save .*to_dense\(\)"),
        (lambda t: t.to("meta"), "meta device and have no values"),
        (lambda t: t.numpy(), r"NumPy arrays: save .*torch.from_numpy"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "packed in few bits"),
        (lambda t: torch.qint8, "packed in few bits"),
    ],
    ids=["sparse", "meta", "NumPy", "quantised", "a dtype of torch's quantised modules"],
)
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_pickles_of_other_tensors_say_what_they_hold(tmp_path, change, advice):
    tensors = {n: change(t) for n, t in random_model(dtype=torch.float32).items()}
    refused_everywhere(saved(tmp_path / "x.pth", tensors), advice, tmp_path, UnsafeFileError)


def test_our_own_packed_weights(tmp_path):
    model = RWKV_Dual.from_pretrained(saved(tmp_path / "m.pth", random_tensors(make_layout("7.0"))))
    quantise_blocks(model, "nf4")
    refused_everywhere(saved(tmp_path / "x.pth", model.state_dict()), "packed in few bits by rwkv_lab", tmp_path)


@pytest.mark.parametrize("shape", [(0,), (0, 16)])
@pytest.mark.parametrize("which", ["all", "one", "lora"])
def test_what_zero_3_left_empty(tmp_path, which, shape):
    tensors, shape = random_lora() if which == "lora" else random_model(), (0,) if which == "lora" else shape
    first = next(iter(tensors))
    tensors = {n: torch.empty(shape) if which != "one" or n == first else t for n, t in tensors.items()}
    path = saved(tmp_path / "x.pth", {f"module.{n}": t for n, t in tensors.items()})
    refused_everywhere(path, rf"tensors are empty, first {first}: DeepSpeed's ZeRO-3 (.|\n)*zero_to_fp32\.py", tmp_path)
    with pytest.raises(LayoutError, match="zero_to_fp32"):
        open_adapter(path, alpha=2.0)


def deepspeed_folder(folder):
    (folder / "global_step9").mkdir(parents=True)
    (folder / "latest").write_text("global_step9")
    (folder / "zero_to_fp32.py").write_text("")
    saved(folder / "global_step9" / "mp_rank_00_model_states.pt", {"module": {}, "dp_world_size": 2, "ds_config": {}})
    saved(
        folder / "global_step9" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        {"single_partition_of_fp32_groups": {}},
    )
    return folder


@pytest.mark.parametrize("inside", ["", "global_step9", ".."])
def test_a_folder_of_deepspeed(tmp_path, inside):
    """Its own, one step's, and the folder of a trainer around it."""
    folder = deepspeed_folder(tmp_path / "trainer" / "run") / inside
    refused_everywhere(folder, r"checkpoint of DeepSpeed, split over its ranks;\nrun .*zero_to_fp32\.py", tmp_path)
    part = tmp_path / "trainer" / "run" / "global_step9" / "mp_rank_00_model_states.pt"
    refused_everywhere(part, "one rank's part of a DeepSpeed checkpoint", tmp_path)


@pytest.mark.parametrize("inside", ["", "pytorch_model_fsdp_0"])
def test_a_folder_of_fsdp(tmp_path, inside):
    folder = tmp_path / "run" / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"\x80\x04.")
    saved(folder / "__0_0.distcp", {"emb.weight": torch.ones(2, 2)})
    says = r"checkpoint of FSDP, split over its ranks(.|\n)*dcp_to_torch"
    refused_everywhere(tmp_path / "run" / inside, says, tmp_path)
    refused_everywhere(folder / "__0_0.distcp", says, tmp_path)


def test_a_state_that_a_model_carries(tmp_path):
    model = RWKV_Dual.from_pretrained(saved(tmp_path / "m.pth", random_tensors(make_layout("7.0"))))
    save_state(tmp_path / "x.safetensors", init_state_with_past(model, make_tokens(1, 4)), model)
    refused_everywhere(tmp_path / "x.safetensors", r"a saved RWKVState(.|\n)*load_state", tmp_path)


def test_the_state_of_an_optimiser(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    path = saved(tmp_path / "x.pth", optimiser.state_dict())
    refused_everywhere(path, "the state of an optimiser, and no model", tmp_path)


def test_a_whole_trainings_file_names_the_model_in_it(tmp_path):
    """Lightning and hand-written loops: the optimiser's state lies beside the model."""
    whole = {"optim": {"state": {}, "param_groups": []}, "model": random_model(), "epoch": 3}
    path = saved(tmp_path / "x.ckpt", whole)
    refused_everywhere(path, "it has 'model', a dict of its own: save that one by itself", tmp_path, RwkvLabError)


ADAPTERS = {
    "LoHa or LoKr": {"blocks.0.att.key.hada_w1_a": torch.ones(16, 2), "blocks.0.att.key.hada_w1_b": torch.ones(2, 16)},
    "LoRA of an embedding": {"emb.lora_embedding_A": torch.ones(2, 11), "emb.lora_embedding_B": torch.ones(16, 2)},
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_of_kinds_that_are_not_read(tmp_path, what):
    save_file(ADAPTERS[what], tmp_path / "x.safetensors")
    refused_everywhere(tmp_path / "x.safetensors", rf"{what}(.|\n)*Merge it where it was trained", tmp_path)


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("deepspeed.runtime.fp16.loss_scaler", "zero_to_fp32"),
        ("torch.distributed._shard.sharded_tensor.api", "dcp_to_torch"),
        ("rwkv_lab.model.state", "save it with save_state|save_state"),
        ("torchao.dtypes", "packed in few bits"),
        ("mymodel", "as tensors only"),
    ],
)
def test_pickles_of_known_tools_are_refused_with_what_to_do(tmp_path, monkeypatch, module, advice):
    import sys
    from types import ModuleType

    made, parts = ModuleType(module), module.split(".")
    kind = type("Thing", (), {"__module__": module, "__qualname__": "Thing"})
    vars(made)["Thing"] = kind
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), sys.modules.get(".".join(parts[:i]), ModuleType("x")))
    monkeypatch.setitem(sys.modules, module, made)
    path = saved(tmp_path / "x.pth", {"emb.weight": torch.ones(2, 2), "other": kind()})
    monkeypatch.undo()
    with pytest.raises(UnsafeFileError, match=advice) as caught:
        open_checkpoint(path)
    assert f"{module}.Thing" in str(caught.value) and str(caught.value).count("\n") < 3


def test_a_recipe_that_lacks_the_weight_of_one_model_names_it(tmp_path):
    for name in "abc":
        saved(tmp_path / f"{name}.pth", random_model(seed=ord(name)))
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels:\n- model: a.pth\n  parameters: {weight: 1}\n- model: b.pth\n"
        "- model: c.pth\n  parameters: {weight: 1}\n"
    )
    with pytest.raises(ParameterError, match=r"weight is missing for .*b\.pth\nGive it under parameters of that model"):
        merge_recipe(tmp_path / "r.yml", tmp_path / "o.pth")
