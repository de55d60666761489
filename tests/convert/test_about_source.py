"""What a plan says of its source, and what it refuses of source and output."""

import json
from dataclasses import replace

import pytest
import torch
from models import LAYOUTS, SEVEN, random_model, random_state, snapshot

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import convert, to_huggingface, to_safetensors
from rwkv_lab.errors import CorruptFileError, LayoutError, OutputError, ParameterError


def saved(folder, tensors, name="m.pth"):
    write_checkpoint(folder / name, tensors, overwrite=True)
    return folder / name


def notes(*args, **options):
    return "\n".join(convert(*args, dry_run=True, **options).notes)


@pytest.mark.parametrize(("to", "out"), [("pth", "o.pth"), ("safetensors", "o.safetensors")])
@pytest.mark.parametrize("left_out", ["head.weight", "blocks.0.ln0.weight", "blocks.1.att.value.weight"])
def test_a_source_that_is_no_whole_model_is_called_so(left_out, to, out, tmp_path):
    model = random_model()
    assert "no whole model" not in notes(saved(tmp_path, model), to, tmp_path / out)
    del model[left_out]
    assert f"no whole model, and is written as it is: 1 tensor is missing or of another shape, first {left_out}" in (
        notes(saved(tmp_path, model), to, tmp_path / out)
    )


def test_tensors_that_no_model_has_are_counted(tmp_path):
    path = saved(tmp_path, random_model() | {"banana": torch.ones(3), "blocks.0.att.qqq": torch.ones(16)})
    assert "2 tensors that no RWKV-7.0 has are written as they are, first banana" in (
        notes(path, "pth", tmp_path / "o.pth")
    )


@pytest.mark.parametrize("to", ["pth", "safetensors", "fla", "gguf"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int32, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_every_target(dtype, to, tmp_path):
    name = "blocks.0.att.key.weight"
    torch.save(random_model() | {name: torch.ones(16, 16).to(dtype)}, tmp_path / "m.pth")
    out = tmp_path / ("o" if to == "fla" else f"o.{to}")
    with pytest.raises(LayoutError, match=f"{name} in .* is {dtype}; weights must be floats"):
        convert(tmp_path / "m.pth", to, out)
    assert not out.exists()


@pytest.mark.parametrize("to", ["pth", "safetensors", "web-rwkv", "fla", "gguf"])
def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_written(to, tmp_path):
    path, out = saved(tmp_path, random_model()), {"fla": "o", "web-rwkv": "o.st"}.get(to, f"o.{to}")
    wrong = [("world", "do not belong together"), ("/no/such", "no tokenizer"), ("x" * 300, "There is no tokenizer")]
    for tokenizer, message in [*wrong, (tmp_path, "it is a folder")]:
        with pytest.raises(ParameterError, match=message):
            convert(path, to, tmp_path / out, tokenizer=tokenizer)
    assert not (tmp_path / out).exists()


def test_a_tokenizer_json_of_the_source_that_stays_behind_is_told(tmp_path):
    folder = to_huggingface(saved(tmp_path, random_model()), tmp_path / "folder").out
    assert "stays behind" not in notes(folder, "fla", tmp_path / "o")
    (folder / "tokenizer.json").write_text("{}")
    assert f"To take it along: tokenizer='{folder / 'tokenizer.json'}'" in notes(folder, "fla", tmp_path / "o")
    assert "stays behind" not in notes(folder, "pth", tmp_path / "o.pth")


@pytest.mark.parametrize(("version", "to"), [("7.0", "world"), ("5.2", "fla"), ("5.0", "world")])
def test_states_of_a_model_that_the_target_does_not_have(version, to, tmp_path):
    layout = LAYOUTS[version]
    path = saved(tmp_path, random_model(layout) | random_state(layout))
    with pytest.raises(LayoutError, match=f"takes tuned states of RWKV-.*this model is RWKV-{version}.\n.*'state'"):
        convert(path, to, tmp_path / "s.safetensors")


def test_a_model_with_a_state_to_transformers_is_not_taken_for_a_state(tmp_path):
    path = saved(tmp_path, random_model() | random_state())
    with pytest.raises(ParameterError, match="a folder is written; name it without .safetensors"):
        convert(path, "transformers", tmp_path / "o.safetensors")


@pytest.mark.parametrize("to", ["pth", "gguf", "fla"])
@pytest.mark.parametrize("where", ["name", "folder", "path"])
def test_outputs_with_names_that_are_too_long(where, to, tmp_path):
    suffix = "" if to == "fla" else f".{to}"
    long = {"name": "x" * 300 + suffix, "folder": f"{'x' * 300}/o{suffix}", "path": f"{'x' * 200}/" * 30 + f"o{suffix}"}
    with pytest.raises(OutputError, match="are the limit"):
        convert(saved(tmp_path, random_model()), to, tmp_path / long[where])


def test_a_file_that_would_become_the_weights_of_its_source(tmp_path):
    folder = convert(saved(tmp_path, random_model()), "fla", tmp_path / "folder", max_shard_size="3KB").out
    before = snapshot(tmp_path)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        with pytest.raises(OutputError, match="would be taken for the weights of"):
            to_safetensors(folder, folder / name)
    assert snapshot(tmp_path) == before
    to_safetensors(folder, folder / "blinkdl.safetensors")


@pytest.mark.parametrize("to", ["fla", "pth"])
@pytest.mark.parametrize("below", [False, True])
def test_outputs_through_links_in_a_circle(below, to, tmp_path):
    path, suffix = saved(tmp_path, random_model()), "" if to == "fla" else ".pth"
    one, other = tmp_path / f"one{suffix}", tmp_path / f"other{suffix}"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(OutputError, match="links in a circle|a link to a file that is not there|is not there"):
        convert(path, to, one / f"o{suffix}" if below else one)


@pytest.mark.parametrize("name", ["x" * 300, "m.pth", "nothing"])
def test_an_allowed_dir_that_is_no_folder(name, tmp_path):
    with pytest.raises(ParameterError, match="is not a folder"):
        convert(saved(tmp_path, random_model()), "pth", tmp_path / "o.pth", allowed_dir=tmp_path / name)


def test_tokens_that_end_a_text_by_the_source_and_not_by_the_output(tmp_path):
    path = saved(tmp_path, random_model(replace(SEVEN, vocab_size=257)))
    folder = convert(path, "fla", tmp_path / "folder").out
    assert "The source states" not in notes(folder, "gguf", tmp_path / "o.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2, "pad_token_id": None}))
    for to, out in (("gguf", "o.gguf"), ("transformers", "o")):
        said = notes(folder, to, tmp_path / out)
        assert "The source states eos_token_id 2; in the output it is" in said and "pad_token_id" not in said
    assert "eos_token_id" not in notes(folder, "pth", tmp_path / "o.pth")


OWN = "{{ messages[0].content }}, and nothing more"


def with_template(folder, form):
    """A converted folder with a template of its own."""
    path = saved(folder, random_model(replace(SEVEN, vocab_size=257)))
    out = convert(path, "fla", folder / "with").out
    config = json.loads((out / "tokenizer_config.json").read_text())
    if form == "jinja":
        (out / "chat_template.jinja").write_text(OWN)
    elif form == "json":
        (out / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))
    else:
        several = [{"name": "tools", "template": "no"}, {"name": "default", "template": OWN}]
        config["chat_template"] = several if form == "several" else OWN
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("form", ["jinja", "json", "config", "several"])
def test_the_chat_template_of_the_source_goes_along(form, tmp_path):
    source, (gguf, again, world) = with_template(tmp_path, form), (tmp_path / n for n in ("o.gguf", "again", "world"))
    for start, to, out in ((source, "gguf", gguf), (gguf, "transformers", again), (again, "fla", world)):
        assert "own chat template goes along" in "\n".join(convert(start, to, out).notes)
    with open_checkpoint(gguf) as ck:
        assert ck.metadata["tokenizer.chat_template"] == OWN
    for folder in (again, world):
        assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == OWN
    assert "chat template stays behind: the output has no place" in notes(source, "pth", tmp_path / "o.pth")


def test_a_chat_template_without_a_tokenizer(tmp_path):
    source = convert(saved(tmp_path, random_model()), "fla", tmp_path / "folder").out
    (source / "chat_template.jinja").write_text(OWN)
    assert (convert(source, "fla", tmp_path / "again").out / "chat_template.jinja").read_text() == OWN
    (source / "chat_template.jinja").write_bytes(b"\xff{}")
    with pytest.raises(CorruptFileError, match=r"chat_template\.jinja beside the model is not UTF-8"):
        convert(source, "fla", tmp_path / "third")


def test_a_licence_that_stays_behind_is_told(tmp_path):
    source = convert(saved(tmp_path, random_model()), "fla", tmp_path / "folder").out
    for name in ("LICENSE", "Licence.md", "NOTICE.txt", "licensed_words.txt"):
        (source / name).write_text("words")
    for to, out in (("gguf", "o.gguf"), ("pth", "o.pth"), ("fla", "o")):
        said = notes(source, to, tmp_path / out)
        assert "LICENSE, Licence.md, NOTICE.txt of the source stays behind" in said


@pytest.mark.parametrize("noted", ["gguf-rwkv7", "fla-rwkv7", "nothing"])
def test_metadata_that_names_a_format_which_the_tensors_do_not_have(noted, tmp_path):
    write_checkpoint(tmp_path / "m.safetensors", random_model(), {"rwkv_lab.format": noted})
    result = convert(tmp_path / "m.safetensors", "fla", tmp_path / "o")
    assert f"metadata states the format '{noted}'; its tensors have other names" in "\n".join(result.notes)
    assert all(check.passed for check in result.checks)


def test_what_is_not_read_for_one_reason_is_one_note(tmp_path):
    path = convert(saved(tmp_path, random_model()), "gguf", tmp_path / "m.gguf").out
    said = [note for note in convert(path, "pth", tmp_path / "o.pth", dry_run=True).notes if "not read" in note]
    assert len(said) == 1 and "blk.0.time_mix_v0.weight of the source and 2 more of its tensors are not read" in said[0]
