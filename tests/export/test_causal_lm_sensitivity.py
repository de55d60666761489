"""What quantisation costs parts of a model of Hugging Face, and graphs by what is proposed for them."""

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_lm import write_model
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from rwkv_lab.errors import ParameterError
from rwkv_lab.export import ConfigurationManager, ExportResult, OnnxModel
from rwkv_lab.export.causal_lm.loading import load_causal_lm
from rwkv_lab.export.causal_lm.onnx_folder import export_causal_lm
from rwkv_lab.export.families.huggingface import HuggingFace
from rwkv_lab.export.family import WholeModel
from rwkv_lab.export.optimising import optimised
from rwkv_lab.export.scanned_model import as_exported
from rwkv_lab.export.sensitivity import scan_sensitivity

HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """With a tied head, and inputs that int4 takes."""
    return write_model(tmp_path_factory.mktemp("qwen3") / "base", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def scanned(base):
    """What the stage of a pipeline chose for a size between that of int4 and int8, and its result."""
    asked = dict(checkpoint_path=base, quantization_level="int4", sensitivity_scan=True, calibration_samples=2)
    configure = ConfigurationManager(environment={}).resolve
    result, whole = ExportResult("it", "now"), WholeModel(base, 1)
    optimised(configure(**asked, kl_budget=1), whole, base, result, base.parent, HuggingFace())
    size = result.sensitivity.frontier[2].bytes
    result = ExportResult("it", "now")
    chosen = optimised(configure(**asked, size_budget=size), whole, base, result, base.parent, HuggingFace())
    return chosen.choice, result


def kl(model: nn.Module, choice: dict, texts: list[torch.Tensor]) -> float:
    """The same by another way: all of a copy is run."""
    quantised, every = copy.deepcopy(model), []
    with torch.no_grad():
        for ids in texts:
            p = model(ids).logits[0].double().log_softmax(-1)
            with as_exported(quantised, choice):
                q = quantised(ids).logits[0].double().log_softmax(-1)
            every.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(every).mean())


def test_each_group_is_measured_alone(base):
    model = load_causal_lm(base)
    texts = np.random.default_rng(0).integers(0, 288, (2, 40))
    found = scan_sensitivity(model, texts.tolist(), "int4")
    groups = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    assert list(dict.fromkeys(d.group for d in found.damages)) == [*groups, "head"]
    assert [d.stored for d in found.damages] == ["int4", "int8"] * 4 + ["int8"] and found.tokens == 80
    for damage in found.damages:
        expected = kl(model, dict.fromkeys(damage.names, damage.stored), [torch.tensor(ids)[None] for ids in texts])
        assert damage.kl == pytest.approx(expected, rel=0.05) and damage.kl > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight  # the model is as it was
    assert "forward" not in vars(model.model.layers[0])
    by_kind = scan_sensitivity(model, texts[:1].tolist(), "int8", "matrix")
    assert [d.group for d in by_kind.damages][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    with pytest.raises(ParameterError, match="none of the model's 288"):
        scan_sensitivity(model, [[288]])
    with pytest.raises(ParameterError, match="A Linear is not scanned"):
        scan_sensitivity(nn.Linear(2, 2), [[1]])


def test_a_pipeline_scans_and_states_what_it_chose(scanned):
    choice, result = scanned
    assert {*choice.values()} == {"int4", "int8"} and choice[HEAD] == "int8" and len(choice) == 15
    proposal = result.sensitivity.proposal
    assert proposal.choice == choice and proposal.bytes == result.sensitivity.frontier[2].bytes
    assert result.calibration["data"] == "english" and result.calibration["texts"] == 2
    stored = {name: way for way, one in result.storage.items() for name in one["tensors"]}
    assert stored.items() >= {n: w for n, w in choice.items() if n != HEAD}.items()  # a tied head is in no file
    assert '"predicted_kl"' in result.as_json()


def test_graphs_have_what_was_chosen(base, scanned, tmp_path):
    import onnx

    choice, result = scanned
    export_causal_lm(base, tmp_path / "out", "int4", 20, False, "", True, choice, exporter="legacy")
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    used = [node.op_type for node in graph.node]
    counts = [[*choice.values()].count(way) for way in ("int4", "int8")]
    assert [used.count(operator) for operator in ("MatMulNBits", "MatMulInteger")] == counts
    assert abs(sum(len(t.raw_data) for t in graph.initializer) - result.sensitivity.proposal.bytes) < 2000  # constants
    model, tokens = load_causal_lm(base), torch.arange(40)[None] * 7
    with torch.no_grad():
        plain = model(tokens).logits.numpy()
        with as_exported(model, choice):
            expected = model(tokens).logits.numpy()
    found, _ = OnnxModel(tmp_path / "out", threads=1).run(tokens.numpy())
    assert np.abs(found - expected).mean() < 0.25 * np.abs(found - plain).mean(), asdict(result.sensitivity.proposal)
