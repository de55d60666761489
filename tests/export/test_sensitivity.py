"""What quantisation costs each part, on a model that has learned something; and what is chosen for a budget."""

import copy

import numpy as np
import pytest
import torch
from tiny_training import tiny_text

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import ParameterError
from rwkv_lab.export import ConfigurationManager, OnnxModel, OptimizationProcessor, run
from rwkv_lab.export.calibration import load_calibration, token_statistics
from rwkv_lab.export.scanned_model import as_exported
from rwkv_lab.export.sensitivity import propose, scan_sensitivity
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import train


class Scanned:
    """A trained model, its training text, and what a scan found."""

    def __init__(self, folder):
        self.text = tiny_text(folder)
        self.path = folder / "base.pth"
        short = dict(steps=60, batch_size=4, ctx_len=32, samples=False, lr=1e-2)
        train("pretrain", self.path, str(self.text), n_embd=64, n_layer=2, head_size=32, **short)
        self.model = RWKV_Dual.from_pretrained(self.path)
        self.texts = load_calibration(self.text, 257, self.model.tokenizer.encode, 4, 48).texts
        self.found = scan_sensitivity(self.model, self.texts)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Scanned:
    return Scanned(tmp_path_factory.mktemp("scanned"))


def kl(model: RWKV_Dual, choice: dict, texts: list[list[int]]) -> float:
    """The same by another way: all of a copy is run, from its tokens on."""
    quantised, every = copy.deepcopy(model), []
    with torch.no_grad():
        for ids in texts:
            p = model.parallel([ids])[0][0].double().log_softmax(-1)
            with as_exported(quantised, choice):
                q = quantised.parallel([ids])[0][0].double().log_softmax(-1)
            every.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(every).mean())


def test_each_group_is_measured_alone(scanned):
    found, before = scanned.found, scanned.model.head.weight.clone()
    groups = list(dict.fromkeys(d.group for d in found.damages))
    assert groups == ["blocks.0.att", "blocks.0.ffn", "blocks.1.att", "blocks.1.ffn", "head"]
    assert [d.stored for d in found.damages] == ["int4", "int8"] * 4 + ["int8"]
    assert found.tokens == sum(map(len, scanned.texts))
    for d in found.damages:
        assert d.kl == pytest.approx(kl(scanned.model, dict.fromkeys(d.names, d.stored), scanned.texts), rel=0.05)
        assert 0 < d.kl_standard_error < d.kl * 2
    for four, eight in zip(found.damages[:8:2], found.damages[1:8:2], strict=True):
        assert four.bytes < eight.bytes and four.saved_bytes > eight.saved_bytes
    assert torch.equal(scanned.model.head.weight, before)  # the model is as it was
    by_kind = scan_sensitivity(scanned.model, scanned.texts[:1], "int8", "matrix")
    assert [d.group for d in by_kind.damages][:2] == ["att.receptance", "att.key"] and len(by_kind.damages) == 7


def test_the_frontier_grows_by_one_group_at_a_time(scanned):
    points = scanned.found.frontier
    assert set(points[0].stored.values()) == {"int4", "int8"} and points[0].stored["head"] == "int8"
    assert set(points[-1].stored.values()) == {"fp16"} and points[-1].predicted_kl == 0
    for a, b in zip(points, points[1:], strict=False):
        assert a.bytes < b.bytes and a.predicted_kl > b.predicted_kl
        assert [g for g in a.stored if a.stored[g] != b.stored[g]] == [b.raised]
    tensors = OptimizationProcessor("int4").plan_quantisation(scanned.model)
    assert points[0].bytes == sum(t.bytes for t in tensors)


def test_budgets(scanned):
    model, texts, found = scanned.model, scanned.texts, scanned.found
    sizes = [p.bytes for p in found.frontier]
    small = propose(model, texts, found, size_budget=sizes[2] + 1)
    assert small.bytes == sizes[2] and small.kl == pytest.approx(kl(model, small.choice, texts), rel=0.05)
    limit = found.frontier[0].predicted_kl / 3
    accurate = propose(model, texts, found, kl_budget=limit)
    assert accurate.kl <= limit and sizes[0] < accurate.bytes < sizes[-1] and 0.5 < accurate.top1 <= 1
    assert propose(model, texts, found).bytes == sizes[0]  # within what validation allows int4
    with pytest.raises(ParameterError, match=f"size_budget=9 bytes: .* level int4 has {sizes[0]:,}"):
        propose(model, texts, found, size_budget=9)
    with pytest.raises(ParameterError, match=r"kl_budget=1e-15: the least KL of the choices within size_budget is"):
        propose(model, texts, found, sizes[1], 1e-15)


@pytest.fixture(scope="module")
def exported(scanned, tmp_path_factory, warm):
    """What an export with a scan wrote, in a size at which some matrices have 4 bits, some 8 and some 16."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    size = next(p.bytes for p in scanned.found.frontier if {"int4", "int8", "fp16"} <= set(p.stored.values()))
    given = dict(checkpoint_path=scanned.path, output_directory=tmp_path_factory.mktemp("out"), naming_pattern="it")
    given |= dict(quantization_level="int4", sensitivity_scan=True, calibration_data=str(scanned.text))
    given |= dict(size_budget=size, calibration_samples=4, run_validation_tests=False)
    with warm.for_children():
        return run(ConfigurationManager(environment={}).resolve(**given))


def test_a_scan_decides_what_an_export_writes(scanned, exported):
    proposal, result = exported.sensitivity.proposal, exported
    assert set(proposal.choice.values()) == {"int4", "int8", "fp16"}
    assert {n: t for t, one in result.storage.items() for n in one["tensors"]}.items() >= proposal.choice.items()
    assert proposal.bytes == sum(one["bytes"] for one in result.storage.values())
    expected = OptimizationProcessor("int4", proposal.choice).apply_quantization(scanned.model).model
    with open_checkpoint(result.pytorch_model_path) as ck:
        assert all(torch.equal(ck[name], weight) for name, weight in expected.named_parameters())
        assert ck.quantised["int4"] > 0 and ck.quantised["int8"] > 0
    assert result.calibration["texts"] == 4 and result.calibration["count"] > result.calibration["distinct"] > 5
    assert '"predicted_kl"' in result.as_json() and '"entropy"' in result.as_json()


def test_what_is_measured_is_what_onnxruntime_computes(scanned, exported):
    graph, tokens = OnnxModel(exported.onnx_model_path), torch.tensor([scanned.texts[0]])
    found = graph.run(tokens.numpy())[0]
    with torch.no_grad(), as_exported(scanned.model, exported.sensitivity.proposal.choice):
        expected = scanned.model.parallel(tokens)[0].numpy()
    plain = scanned.model(tokens)[0].detach().numpy()
    error = np.abs(found - expected).mean() / np.abs(found - plain).mean()
    assert error < 0.15, error  # a value at the edge of two levels may go either way


def test_weights_of_a_mixed_graph_bit_for_bit(scanned, exported):
    import onnx
    from onnx import numpy_helper

    from rwkv_lab.checkpoint.rounding import from_int4, from_int8

    choice = exported.sensitivity.proposal.choice
    graph = onnx.load(f"{exported.onnx_model_path}/model.onnx").graph
    written = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights = dict(OptimizationProcessor("int4", choice).apply_quantization(scanned.model).model.named_parameters())
    ends = {"int8": ("int8", "scale"), "int4": ("int4", "scales", "zero_points"), "fp16": ("fp16",)}
    for name, way in choice.items():
        parts = [written[f"{name}.{end}"] for end in ends[way]]
        back = {"int8": from_int8, "int4": from_int4}.get(way, lambda x: x.astype(np.float32))(*parts).T
        assert np.array_equal(weights[name].numpy(), back), name


def test_options_of_a_scan_that_do_not_go_together():
    for values, says in (
        (dict(size_budget="20MB"), "size_budget is of sensitivity_scan=True"),
        (dict(sensitivity_scan=True), "of int8 and int4, not of 'none'"),
        (dict(sensitivity_scan=True, quantization_level="int4", pytorch_format="gguf"), "a GGUF file has one level"),
        (dict(sensitivity_scan=True, quantization_level="int4", size_budget="much"), "size_budget"),
        (dict(sensitivity_scan=True, quantization_level="int4", kl_budget=0), "kl_budget"),
    ):
        with pytest.raises(ParameterError, match=says):
            ConfigurationManager(environment={}).resolve(checkpoint_path="A.pth", **values)


def test_token_statistics():
    found = token_statistics([[1, 1, 2], [1, 3]], 10)
    assert (found.count, found.distinct, found.vocabulary_share) == (5, 3, 0.3)
    assert found.most_frequent == ((1, 3), (2, 1), (3, 1)) and found.entropy == pytest.approx(1.37095)
    with pytest.raises(ParameterError, match="no tokens"):
        token_statistics([[]], 10)


def test_calibration_data_of_every_kind(tmp_path):
    english = load_calibration("english", 257, list, 3, 40)
    assert [len(ids) for ids in english.texts] == [40, 40, 40] and english.data == "english"
    np.save(tmp_path / "tokens.npy", np.arange(20_000, dtype=np.uint16) % 250)
    assert load_calibration(tmp_path / "tokens.npy", 257, samples=2, length=9).texts[1][0] == 9000 % 250
    lines = "".join(f'{{"instruction": "What is {i}?", "output": "A number, {i}."}}\n' for i in range(20))
    (tmp_path / "mine.jsonl").write_text(lines)
    assert b"A number" in bytes(load_calibration(tmp_path / "mine.jsonl", 257, list, 2).texts[0])
    for values, says in (
        (dict(data="english", vocab_size=257), "is text, and the model has no tokenizer"),
        (dict(data=tmp_path / "tokens.npy", vocab_size=100), "outside the model's"),
        (dict(data="englisch", vocab_size=257, encode=list), "neither one of english, python"),
    ):
        with pytest.raises(ParameterError, match=says):
            load_calibration(**values)


def test_texts_that_cannot_be_measured_on(scanned):
    for texts, says in (([], "texts is empty"), ([[1], []], "an empty one"), ([[300]], "none of the model's 257")):
        with pytest.raises(ParameterError, match=says):
            scan_sensitivity(scanned.model, texts)
