"""Configurations: file, environment and keywords, where values come from, and what is refused."""

import re
from pathlib import Path

import pytest

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.export import ConfigurationManager, ExportConfiguration
from rwkv_lab.export.configuration_manager import variable_of

ROOT = Path(__file__).parents[2]
FILE = """
export:
  checkpoint: {path: A.pth}
  base_model: {base_model_name: B.pth}
  optimization: {quantization_level: int8, compress_weights: false}
  formats: {onnx: false, onnx_opset_version: 21}
  validation: {test_input_samples: [One text, another]}
  output: {directory: out}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "export.yaml"
    path.write_text(text)
    return path


def test_keywords_before_the_environment_before_the_file_before_defaults(tmp_path):
    environment = {"EXPORT_QUANTIZATION_LEVEL": "int4", "EXPORT_LOG_LEVEL": "debug", "EXPORT_ENABLE_ONNX": "1"}
    found = ConfigurationManager(written(tmp_path, FILE), environment).resolve(log_level="ERROR")
    assert found.quantization_level == "int4" and found.log_level == "ERROR" and found.export_onnx is True
    assert found.checkpoint_path == Path("A.pth").absolute() and found.output_directory == Path("out").absolute()
    assert found.test_input_samples == ["One text", "another"] and found.onnx_opset_version == 21
    where = found.origins
    assert where["quantization_level"] == "EXPORT_QUANTIZATION_LEVEL" and where["export_onnx"] == "EXPORT_ENABLE_ONNX"
    assert where["log_level"] == "argument" and where["checkpoint_path"] == where["output_directory"] == "export.yaml"
    assert where["overwrite"] == "default" and where.keys() == ExportConfiguration.model_fields.keys()
    assert "quantization_level = int4  (EXPORT_QUANTIZATION_LEVEL)" in found.described().splitlines()


def test_every_option_has_a_group_and_a_variable_that_is_documented():
    grouped = [name for names in ExportConfiguration.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(ExportConfiguration.model_fields)
    page = (ROOT / "docs/environment.md").read_text()
    names = [variable_of(name) for name in grouped]
    assert len(set(names)) == len(names) and [n for n in names if f"`{n}`" not in page] == []
    wanted = {"EXPORT_CHECKPOINT_PATH", "EXPORT_OUTPUT_DIR", "EXPORT_QUANTIZATION_LEVEL", "EXPORT_ENABLE_ONNX"}
    assert wanted | {"EXPORT_LOG_LEVEL"} <= set(names)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("EXPORT_OVERWRITE", "yes", "overwrite", True),
        ("EXPORT_OVERWRITE", "0", "overwrite", False),
        ("EXPORT_MODEL_NAME", "7", "model_name", "7"),
        ("EXPORT_ONNX_OPSET_VERSION", "22", "onnx_opset_version", 22),
        ("EXPORT_USE_EXTERNAL_DATA_FORMAT", "true", "use_external_data_format", True),
        ("EXPORT_ALPHA", "1e1", "alpha", 10.0),
        ("EXPORT_TEST_INPUT_SAMPLES", "3", "test_input_samples", 3),
        ("EXPORT_TEST_INPUT_SAMPLES", "[a text]", "test_input_samples", ["a text"]),
        ("EXPORT_QUANTIZATION_LEVEL", "none", "quantization_level", "none"),
    ],
)
def test_texts_of_variables(variable, text, name, value):
    found = ConfigurationManager(environment={variable: text}).resolve(checkpoint_path="A.pth")
    assert getattr(found, name) == value and found.origins[name] == variable


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("exports: {}", "'exports' is not known at its top; did you mean export"),
        ("export: {optimisation: {}}", "'optimisation' is not known under export:; did you mean optimization"),
        ("export: {checkpoint_path: A.pth}", "checkpoint_path stands directly under export:.*under checkpoint:"),
        ("export: {output: {log_levl: INFO}}", "no parameter 'log_levl'; did you mean log_level"),
        ("export: {output: {checkpoint_path: A}}", "stands under output:; it belongs under checkpoint:"),
        ("export: {checkpoint: {path: A, checkpoint_path: A}}", "checkpoint_path is given twice"),
        ("export: {checkpoint: A.pth}", "checkpoint: must hold names and values"),
        ("export: {checkpoint: {path: A, path: B}}", "twice"),
        ("- a", "holds no mapping; a configuration has export:"),
        ("", "holds no mapping"),
    ],
)
def test_files_that_are_refused(text, says, tmp_path):
    with pytest.raises(ParameterError, match=says) as refusal:
        ConfigurationManager(written(tmp_path, text))
    assert len(str(refusal.value).splitlines()) <= 3


def test_a_file_that_would_run_code_is_no_yaml_here(tmp_path):
    (tmp_path / "x.yaml").write_text("export: !!python/object/apply:os.system ['touch ran']")
    for text in ("export: !!python/object/apply:os.system ['touch ran']", "export: {a: [", "\0"):
        with pytest.raises(CorruptFileError, match="is not YAML"):
            ConfigurationManager(written(tmp_path, text))
    with pytest.raises(ParameterError, match="no file .*exprot.yaml; did you mean export.yaml"):
        ConfigurationManager(tmp_path / "exprot.yaml")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "checkpoint_path is missing\nGive it as .* EXPORT_CHECKPOINT_PATH"),
        ({"quantization_level": "int2"}, "quantization_level='int2': it should be 'none', .* or 'nf4'"),
        ({"quantization_level": "nf4"}, "quantization_level='nf4' is for PyTorch alone: export_onnx=False"),
        ({"onnx_opset_version": 17}, "onnx_opset_version=17"),
        ({"onnx_opset_version": 26}, "onnx_opset_version=26"),
        ({"quantisation_level": "int8"}, "no parameter 'quantisation_level'; did you mean quantization_level"),
        ({"naming_pattern": "../{model_name}"}, "it should be a name: without /"),
        ({"naming_pattern": "{modelname}"}, "it has {modelname}; did you mean model_name"),
        ({"naming_pattern": "{model_name.__class__}"}, "it has {model_name.__class__}"),
        ({"naming_pattern": "{"}, "naming_pattern"),
        ({"naming_pattern": " "}, "it is empty"),
        ({"model_name": "a/b"}, "it should be a name"),
        ({"test_input_samples": []}, "test_input_samples"),
        ({"test_input_samples": 0}, "test_input_samples"),
        ({"export_tensorrt": True, "export_onnx": False}, "needs export_onnx=True"),
        ({"export_tensorrt": True, "onnx_dynamic_axes": False}, "needs onnx_dynamic_axes=True; engines of one size"),
        ({"onnx_fixed_sizes": [1, 16]}, "it should be three sizes"),
        ({"onnx_fixed_sizes": [1, 64, 32]}, "it should be three sizes"),
        ({"onnx_fixed_sizes": [1, 1, 31]}, "which are 32 or more"),
        ({"onnx_exporter": "torchscript"}, "onnx_exporter='torchscript': it should be 'dynamo' or 'legacy'"),
        ({"attention_implementation": "flash"}, "it should be 'eager' or 'sdpa'"),
        ({"device": "cuda"}, "no parameter 'device'"),
        ({"export_onnx": False, "export_pytorch": False}, "nothing would be written"),
    ],
)
def test_values_that_are_refused(values, says):
    given = {"checkpoint_path": "A.pth"} | values if values else {}
    with pytest.raises(ParameterError, match=re.sub("[{}]", r"\\\g<0>", says)) as refusal:
        ConfigurationManager(environment={}).resolve(**given)
    assert len(str(refusal.value).splitlines()) <= 3


def test_a_refusal_says_where_the_value_came_from(tmp_path):
    with pytest.raises(ParameterError, match="'int3'.*\nIt comes from EXPORT_QUANTIZATION_LEVEL"):
        ConfigurationManager(environment={"EXPORT_QUANTIZATION_LEVEL": "int3"}).resolve(checkpoint_path="A.pth")
    with pytest.raises(ParameterError, match="\nIt comes from export.yaml"):
        ConfigurationManager(written(tmp_path, FILE.replace("int8", "eight")), {}).resolve()


def test_a_variable_that_is_nearly_one_is_refused_and_others_are_not_ours():
    for wrong, right in (
        ("EXPORT_QUANTISATION_LEVEL", "EXPORT_QUANTIZATION_LEVEL"),
        ("EXPORT_ONNX", "EXPORT_ENABLE_ONNX"),
        ("EXPORT_OUTPUT_DIRECTORY", "EXPORT_OUTPUT_DIR"),
        ("EXPORT_TENSORRT", "EXPORT_ENABLE_TENSORRT"),
    ):
        with pytest.raises(ParameterError, match=f"{wrong} is not known; did you mean {right}[?]"):
            ConfigurationManager(environment={wrong: "int8"})
    ConfigurationManager(environment={"EXPORT_XYZ": "1", "HOME": "/"})


@pytest.mark.parametrize(
    ("text", "variable", "keyword", "where"),
    [("[none, int8]", "", None, "export.yaml"), ("int4", "none, int8", None, "EXPORT_QUANTIZATION_LEVEL"),
     ("int4", "int4", ["none", "int8", "int8"], "argument"), ("int4", "", "none,int8", "argument")],
)  # fmt: skip
def test_a_configuration_for_each_of_several_levels(tmp_path, text, variable, keyword, where):
    file = written(tmp_path, f"export: {{checkpoint: {{path: A.pth}}, optimization: {{quantization_level: {text}}}}}")
    manager = ConfigurationManager(file, {"EXPORT_QUANTIZATION_LEVEL": variable})
    first, second = manager.resolve_levels(**({} if keyword is None else {"quantization_level": keyword}))
    assert (first.quantization_level, second.quantization_level) == ("none", "int8")
    assert first.origins["quantization_level"] == second.origins["quantization_level"] == where
    assert first.naming_pattern == "{model_name}_{timestamp}-{quantization_level}"
    assert first.origins["naming_pattern"] == "default, and the level"
    assert (first.export_pytorch, second.export_pytorch) == (True, False)
    assert second.origins["export_pytorch"] == "written with level none"


def test_one_level_is_one_configuration():
    manager = ConfigurationManager(environment={})
    for given in ({}, {"quantization_level": "int8"}, {"quantization_level": ["int8"]}):
        (found,) = manager.resolve_levels(checkpoint_path="A.pth", **given)
        assert found.quantization_level == ("int8" if given else "none") and found.export_pytorch
        assert found.naming_pattern == "{model_name}_{timestamp}"
        assert found.origins["quantization_level"] == ("argument" if given else "default")
    alone = manager.resolve_levels(checkpoint_path="A.pth", quantization_level="none,int8", export_onnx=False)
    assert [one.export_pytorch for one in alone] == [True, True]


@pytest.mark.parametrize("level", [[], ["int8", "int7"], ["int8", 4], "int8,int7"])
def test_a_wrong_level_among_several_is_refused(level):
    with pytest.raises(ParameterError, match="quantization_level="):
        ConfigurationManager(environment={}).resolve_levels(checkpoint_path="A.pth", quantization_level=level)
    with pytest.raises(ParameterError, match="quantization_level="):
        ConfigurationManager(environment={}).resolve(checkpoint_path="A.pth", quantization_level=level)
