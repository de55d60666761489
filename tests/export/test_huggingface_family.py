"""Models of Hugging Face through the whole pipeline: base and adapter of peft to ONNX with a cache, and its text."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from causal_lm import edit_json, make_tokenizer, write_adapter, write_model
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from rwkv_lab.errors import (
    CheckpointValidationError,
    CorruptFileError,
    FormatExportError,
    LayoutError,
    ModelMergeError,
    ParameterError,
    ValidationError,
)
from rwkv_lab.export import (
    CheckpointDetector,
    ConfigurationManager,
    ModelMerger,
    OnnxModel,
    plan_export,
    run,
    run_levels,
    tensorrt_engines,
)
from rwkv_lab.export.attempt import Attempt
from rwkv_lab.export.causal_lm import nf4
from rwkv_lab.export.causal_lm.loading import load_causal_lm
from rwkv_lab.export.causal_lm.onnx_folder import export_causal_lm
from rwkv_lab.peft.quantised import dequantize_nf4, quantised_and_back, quantize_nf4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of transformers and peft
MESSAGES = [{"role": "user", "content": "Which river?"}]


def configure(**values):
    return ConfigurationManager(environment={}).resolve(**values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `base`, a Qwen3 with a tied head, and `out/checkpoint-8`, as Trainer leaves it."""
    folder = tmp_path_factory.mktemp("qwen3")
    base = write_model(folder / "base", tie_word_embeddings=True)
    adapter = write_adapter(folder / "out/checkpoint-8", base, steps=8)
    (adapter / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def exports(trained, warm):
    """By level: what `run` returned for it."""
    asked = configure(
        checkpoint_path=trained / "out",
        output_directory=trained / "exports",
        naming_pattern="qwen3",
        test_input_samples=["The river remembers its stones, and so does the sea. " * 6],
    )
    levels = ("none", "int8")
    with pytest.MonkeyPatch.context() as patch, warm.for_children():
        patch.setattr("rwkv_lab.export.validation_tester.SHAPES", ((1, 1), (3, 17), (1, 131)))
        asked = [asked.model_copy(update={"quantization_level": x, "naming_pattern": f"qwen3-{x}"}) for x in levels]
        return dict(zip(levels, run_levels(asked), strict=True))


@pytest.fixture(scope="module")
def graph(exports) -> OnnxModel:
    return OnnxModel(exports["none"].onnx_model_path, threads=1)


def test_the_whole_pipeline(exports, trained):
    for level, result in exports.items():
        assert result.success and result.validation_passed, result.verdict
        names = [str(check.name) for check in result.checks]
        assert any(name.startswith("logits beside peft's base with adapter") for name in names)
        assert any("axes of any size" in name for name in names)
        assert any("padded on the left" in name for name in names) is (level == "none")
        assert any("which the adapter names" in warning for warning in result.warnings)
        assert (trained / f"exports/qwen3-{level}/validation.json").is_file()
    import onnx

    used = [node.op_type for node in onnx.load(f"{exports['int8'].onnx_model_path}/model.onnx").graph.node]
    assert used.count("MatMulInteger") == 15  # those of two layers, and of the head, which is tied to the embedding


def test_the_graph_is_ready_for_tensorrt(exports, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_engines, "find_spec", lambda name: None)  # as where it is not installed
    sizes = {"batch": [1, 2, 4], "length": [1, 8, 32]}
    source = Path(exports["none"].onnx_model_path)
    found = tensorrt_engines.export_tensorrt(source, tmp_path / "out", sizes, None, False)
    assert str(found) == "TensorRT: not built (the package tensorrt is not installed)"
    shapes = json.loads((tmp_path / "out/profiles.json").read_text())["graphs"]["model.onnx"]
    assert shapes["attention_mask"] == [[1, 1], [2, 16], [4, 64]]
    with pytest.raises(FormatExportError, match="DynamicQuantizeLinear.* is no operator that it has"):
        source = Path(exports["int8"].onnx_model_path)
        tensorrt_engines.export_tensorrt(source, tmp_path / "int8", sizes, None, False)


def test_the_folder_for_pytorch_is_loaded_by_transformers(exports):
    import transformers

    for level, dtype in (("none", torch.float32), ("int8", torch.float16)):
        folder = Path(exports[level].pytorch_model_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == dtype and model.config.tie_word_embeddings
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
        assert (folder / "generation_config.json").is_file()


def test_onnxruntime_continues_as_transformers_does(exports, graph):
    model = load_causal_lm(Path(exports["none"].pytorch_model_path))
    prompt = graph.tokenizer.encode("The river remembers ")
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    expected = found[0, len(prompt) :].tolist()
    pieces = list(graph.stream("The river remembers ", 12, temperature=0))
    assert [token for token, _ in pieces] == expected
    said = graph.generate("The river remembers ", 12, temperature=0)
    assert said == "".join(text for _, text in pieces) == make_tokenizer().decode(expected, skip_special_tokens=True)


def test_a_prompt_read_in_parts_and_rows_of_unequal_length(graph):
    tokens = np.random.default_rng(3).integers(0, 256, (2, 19))
    whole, end = graph.run(tokens)
    _, state = graph.run(tokens[:, :5])
    rest, after = graph.run(tokens[:, 5:], state)
    np.testing.assert_allclose(rest, whole[:, 5:], atol=1e-4)
    np.testing.assert_allclose(after["past_key_values.1.key"], end["past_key_values.1.key"], atol=1e-4)
    mask = np.ones((2, 19), np.int64)
    mask[1, :6] = 0
    padded, state = graph.run(tokens, attention_mask=mask)
    alone, _ = graph.run(tokens[1:, 6:])
    np.testing.assert_allclose(padded[1, 6:], alone[0], atol=1e-4)
    step, _ = graph.run([[5], [5]], state)  # the mask of what was read is in the state
    np.testing.assert_allclose(step[1], graph.run(np.append(tokens[1, 6:], 5)[None])[0][0, -1], atol=1e-4)
    np.testing.assert_array_equal(graph.create_state(2)["attention_mask"], np.zeros((2, 0)))


def test_a_chat_is_written_by_the_template_that_was_saved(graph):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(next(graph.folder.parent.glob("pytorch/*")))
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert graph.chat_prompt(MESSAGES) == expected
    assert graph.tokenizer.encode(expected) == theirs.encode(expected)
    assert not graph.chat_prompt(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


def test_a_text_ends_where_the_model_ends_it(graph, monkeypatch):
    end = graph.tokenizer.encode("<|im_end|>")[0]
    assert end in json.loads((graph.folder / "export.json").read_text())["end_tokens"]
    rest, asked = iter([65, 66, end, 67]), []
    monkeypatch.setattr("rwkv_lab.export.onnx_model._sample", lambda *_: asked.append(1) or next(rest))
    assert graph.generate("a", 10) == graph.tokenizer.decode([65, 66]) and len(asked) == 3


def test_it_runs_without_torch_and_transformers(graph):
    code = (
        "import sys; from rwkv_lab.export import OnnxModel; m = OnnxModel('.', threads=1);"
        "print(len(m.chat_prompt([{'role': 'user', 'content': 'x'}])), m.generate('a', 2) is not None);"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=graph.folder, check=True, timeout=300)


OTHERS = {  # weights of one layer, in a form that the pipeline's models do not have
    "int4": ("LlamaConfig", "eager", {"tie_word_embeddings": False}),
    "fp16": ("Qwen2Config", "sdpa", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("weights", OTHERS)
def test_other_models_and_weights(tmp_path, weights):
    config, attention, options = OTHERS[weights]
    base = write_model(tmp_path / "base", config, num_hidden_layers=1, **options)
    # 23: a fused rotation fails at batch 3, and sdpa is one operator.
    export_causal_lm(base, tmp_path / "onnx", weights, 23, True, "", True, attention=attention)
    graph, model = OnnxModel(tmp_path / "onnx", threads=1), load_causal_lm(base)
    tokens = np.random.default_rng(1).integers(0, 256, (3, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    error = np.abs(graph.run(tokens)[0] - expected).max() / np.abs(expected).max()
    assert 1e-7 < error < {"int4": 0.3, "fp16": 1e-3}[weights]
    import onnx

    used = [node.op_type for node in onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).graph.node]
    counts = [used.count(operator) for operator in ("MatMulNBits", "MatMulInteger")]
    assert counts == ([7, 1] if weights == "int4" else [0, 0])  # the head stays at 8 bits
    assert used.count("Attention") == (attention == "sdpa")
    stored = (tmp_path / "onnx/model.onnx.data").stat().st_size
    assert stored < 0.75 * sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": "MistralConfig", "sliding_window": 64}, "sliding"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "changes with the length"),
    ],
)
def test_attention_that_one_graph_does_not_have_is_refused(tmp_path, options, message):
    base = write_model(tmp_path / "base", num_hidden_layers=1, **options)
    with pytest.raises(LayoutError, match=message):
        export_causal_lm(base, tmp_path / "onnx", "fp32", 20, None, "", True)
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(ModelMergeError, match=message):  # before anything is written
        run(configure(checkpoint_path=base, output_directory=tmp_path / "e"))


# ------------------------------------------------------------------ what is refused


@pytest.fixture
def refused(trained, tmp_path):
    """`refused(error, message, **options)`: an export that fails so, and leaves nothing but the reason."""

    def check(error, message, **options):
        given = {"checkpoint_path": trained / "out", "output_directory": tmp_path / "e", "naming_pattern": "x"}
        with pytest.raises(error, match=message):
            run(configure(**{**given, **options}))
        left = sorted(path.name for path in (tmp_path / "e").iterdir()) if (tmp_path / "e").exists() else []
        assert left in ([], ["x.failed.json"])

    return check


def copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


def test_unusable_inputs_are_refused(trained, refused, tmp_path):
    adapter = trained / "out/checkpoint-8"
    other = write_model(tmp_path / "other", tie_word_embeddings=True, hidden_size=32)
    refused(ModelMergeError, "is of another model", base_model_name=str(other))
    lost = copied(adapter, tmp_path / "lost")
    edit_json(lost / "adapter_config.json", base_model_name_or_path="Qwen/Qwen3-0.6B")
    refused(ModelMergeError, "as base_model_name", checkpoint_path=lost)
    edit_json(lost / "adapter_config.json", peft_type="IA3")
    refused(CheckpointValidationError, "ia3", checkpoint_path=lost)
    base = copied(trained / "base", tmp_path / "base")
    (base / "tokenizer.json").unlink()
    refused(ModelMergeError, "no tokenizer.json", checkpoint_path=base)
    refused(ModelMergeError, "no tokenizer.json in .*nowhere", tokenizer=str(tmp_path / "nowhere"))
    edit_json(base / "config.json", model_type="gpt9")
    refused(ModelMergeError, "no causal language model of type 'gpt9'", checkpoint_path=base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    refused(CheckpointValidationError, "model.safetensors", checkpoint_path=base)


def test_nf4_as_transformers_keeps_it(trained, tmp_path, monkeypatch):
    rounded = []
    monkeypatch.setattr(nf4, "quantize_nf4", lambda weight: rounded.append(1) or quantize_nf4(weight))
    asked = {"checkpoint_path": trained / "base", "output_directory": tmp_path, "naming_pattern": "x"}
    result = run(configure(**asked, quantization_level="nf4", export_onnx=False))
    folder = Path(result.pytorch_model_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["load_in_4bit"] and config["bnb_4bit_quant_type"] == "nf4"
    assert "lm_head" in config["llm_int8_skip_modules"] and any("2 matrices" in one for one in result.warnings)
    found, before = (load_file(place / "model.safetensors") for place in (folder, trained / "base"))
    for name, weight in before.items():
        if not name.endswith("_proj.weight") or "down_proj" in name:  # 96 inputs, which is no multiple of 64
            assert torch.equal(found[name], weight)
            continue
        about = json.loads(bytes(found[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        assert about == {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        back = dequantize_nf4(found[name].flatten(), found[f"{name}.absmax"], weight.shape)
        assert torch.equal(back, quantised_and_back(weight, "nf4")) and found[name].shape == (weight.numel() // 2, 1)
    assert len(rounded) == len([name for name in found if name.endswith(".absmax")])  # each matrix once
    with pytest.raises(ModelMergeError, match="is quantised .bitsandbytes."):
        ModelMerger().load_base_model(folder)


@pytest.mark.parametrize("level", ["none", "fp16", "int8", "nf4"])
def test_the_plan_states_what_a_folder_for_pytorch_takes(level, trained, tmp_path):
    asked = {"checkpoint_path": trained / "base", "output_directory": tmp_path, "naming_pattern": "x"}
    configuration = configure(**asked, quantization_level=level, export_onnx=False)
    (planned,) = plan_export([configuration]).outputs
    written = (Path(run(configuration).pytorch_model_path) / "model.safetensors").stat().st_size
    assert 0 < written - planned.bytes < 10_000  # the header; of nf4, levels and descriptions


def test_samples_longer_than_the_context_are_refused(graph, trained, refused, monkeypatch):
    def ready(exporter, folder):  # tracing takes seconds
        exporter.attempts.append(Attempt({}, "as asked for"))
        shutil.copytree(graph.folder, folder)
        return []

    monkeypatch.setattr("rwkv_lab.export.FormatExporter.export_onnx_model", ready)
    asked = {"checkpoint_path": trained / "base", "test_input_samples": ["short", "x" * 601]}
    refused(ValidationError, "Text 2 of test_input_samples has 601 tokens; the model's context ends at 600", **asked)


def test_what_the_graph_cannot_take_is_refused(graph):
    with pytest.raises(ParameterError, match="context ends at 600"):
        graph.run(np.zeros((1, 601), np.int64))
    with pytest.raises(ParameterError, match="Pass max_new_tokens=597"):
        graph.generate("abc", 600)
    with pytest.raises(ParameterError, match="0 behind a 1"):
        graph.run([[1, 2]], attention_mask=[[1, 0]])
    with pytest.raises(ParameterError, match="0 and 1 of shape"):
        graph.run([[1, 2]], attention_mask=[[1, 2]])
    _, state = graph.run([[1, 2]])
    with pytest.raises(ParameterError, match="past_key_values.0.value"):
        graph.run([[1]], {**state, "past_key_values.0.value": state["past_key_values.0.value"][:, :1]})
    for messages in ([{"role": "user"}, 3], [{"content": object()}]):
        graph.chat_prompt([m for m in messages if isinstance(m, dict)])  # missing parts are empty to Jinja
    with pytest.raises(ParameterError):
        graph.chat_prompt([3])


def test_a_template_is_kept_in_its_sandbox(graph, tmp_path):
    folder = copied(graph.folder, tmp_path / "m")
    for text, message in (
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "too big|MAX"),
        ("{{ raise_exception('no roles') }}", "no roles"),
        ("{% if %}", "cannot be applied"),
    ):
        (folder / "chat_template.jinja").write_text(text)
        manifest = json.loads((folder / "export.json").read_text())
        manifest["files"]["chat_template.jinja"]["bytes"] = len(text)
        (folder / "export.json").write_text(json.dumps(manifest))
        with pytest.raises(ParameterError, match=message):
            OnnxModel(folder, threads=1).chat_prompt(MESSAGES)
    edit_json(folder / "export.json", layout={"vocab_size": 3})
    with pytest.raises(CorruptFileError, match="does not describe"):
        OnnxModel(folder)


def test_a_training_of_the_whole_model_is_a_checkpoint(trained, tmp_path):
    folder = copied(trained / "base", tmp_path / "runs/checkpoint-20")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    found = CheckpointDetector(tmp_path / "runs").detect_latest_checkpoint()
    assert (found.name, found.step, found.kind) == ("checkpoint-20", 20, "model")
    asked = configure(
        checkpoint_path=tmp_path / "runs", output_directory=tmp_path, naming_pattern="x", export_onnx=False
    )
    result = run(asked)
    assert any("optimizer.pt" in warning for warning in result.warnings)
    assert not list(Path(result.pytorch_model_path).glob("*.pt"))
