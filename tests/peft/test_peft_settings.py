"""Configurations of Hugging Face's peft that say otherwise than their tensors which layers are adapted."""

import json

import pytest
from models import random_lora, random_model
from safetensors.torch import load_file, save_file

from rwkv_lab import merge
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.convert import convert
from rwkv_lab.peft import open_adapter

RIGHT = ["att.key", "value", "output", "k_proj", "v_proj", "o_proj", "ffn.key"]  # under the names of both formats


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LoRA with whole norms as peft's folders, with BlinkDL's names and with those of fla."""
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "m.pth", random_model())
    write_checkpoint(folder / "l.pth", random_lora())
    convert(folder / "l.pth", "pth", folder / "blinkdl", alpha=6.0)
    convert(folder / "l.pth", "fla", folder / "fla", alpha=6.0, generation="7.0")
    return folder


def changed(folders, name, tmp_path, **settings):
    """The folder with other settings."""
    (tmp_path / "a").mkdir()
    config = json.loads((folders / name / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = load_file(folders / name / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    return tmp_path / "a"


OTHERWISE = [
    (
        {"target_modules": ["output", "o_proj"]},
        "does not name 8 of the 10 layers",
    ),
    ({"target_modules": ["head", *RIGHT]}, "names head"),
    ({"target_modules": []}, "does not name 10 of the 10 layers"),
    ({"target_modules": r".*\.(nonsense)"}, "does not name 10 of the 10 layers"),
    ({"target_modules": "("}, "does not name 10 of the 10 layers"),
    ({"layers_to_transform": [0]}, "does not name 5 of the 10 layers that have tensors, first blocks.1.att.key"),
    ({"layers_to_transform": 1}, "does not name 5 of the 10 layers that have tensors, first blocks.0.att.key"),
    ({"exclude_modules": ["key"]}, "layers that have tensors, first blocks.0."),
    ({"exclude_modules": r".*\.1\..*"}, "does not name 5 of the 10 layers that have tensors, first blocks.1.att.key"),
    ({"modules_to_save": ["head"]}, "modules_to_save names head, and the adapter has no tensor of that"),
    ({"modules_to_save": None}, "does not name 2 of the 2 tensors that are there whole, first blocks.0.ln1.weight"),
]


@pytest.mark.parametrize("name", ["blinkdl", "fla"])
@pytest.mark.parametrize(("settings", "said"), OTHERWISE)
def test_what_the_configuration_says_otherwise_is_told(settings, said, name, folders, tmp_path):
    path = changed(folders, name, tmp_path, **settings)
    with open_adapter(path) as adapter:
        assert any(said in note for note in adapter.notes)
        assert len(adapter.targets) == 10
    plan = convert(path, "pth", tmp_path / "o.pth", dry_run=True)
    assert any(said in note for note in plan.notes)


@pytest.mark.parametrize("name", ["blinkdl", "fla"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": [*RIGHT, "key"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*(key|value|output|[kvo]_proj)"},
        {"layers_to_transform": [0, 1]},
    ],
)
def test_what_agrees_is_not_told(settings, name, folders, tmp_path):
    with open_adapter(changed(folders, name, tmp_path, **settings)) as adapter:
        assert not any("does not name" in note for note in adapter.notes)


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [r"((\w|\.)*)*!", r"(\w+\.?)+!", r".*.*.*.*!", r"(a|.){1,99}!"])
def test_a_regular_expression_that_takes_too_long_is_not_tried(pattern, setting, folders, tmp_path):
    """On a name of 30 letters the first would take hours."""
    with open_adapter(changed(folders, "fla", tmp_path, **{setting: pattern})) as adapter:
        assert any(note.startswith(f"{setting} is a regular expression") for note in adapter.notes)
        assert not any("does not name" in note for note in adapter.notes) and len(adapter.targets) == 10


def test_a_merge_says_it_too(folders, tmp_path):
    path = changed(folders, "fla", tmp_path, target_modules=r".*att.*", modules_to_save=None)
    notes = merge(folders / "m.pth", path, tmp_path / "o.pth", dry_run=True).plan.notes
    assert any(n.startswith("a: adapter_config.json does not name") for n in notes)


def test_a_prefix_that_stands_twice_is_told(folders, tmp_path):
    path = changed(folders, "fla", tmp_path)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, path / "adapter_model.safetensors")
    result = convert(path, "pth", tmp_path / "o.pth")
    assert any("stands twice before its names, base_model.model.base_model.model.:" in n for n in result.notes)
    assert all(check.passed for check in result.checks)
