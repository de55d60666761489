"""Uploads to the Hugging Face Hub: huggingface_hub itself, against a stand-in over HTTP."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hub_stand_in import READ_TOKEN, TOKEN, sha256
from models import random_lora, random_model, random_state, snapshot

from rwkv_lab import merge
from rwkv_lab.checkpoint import write_checkpoint
from rwkv_lab.convert import ConvertOptions, convert, push_to_hub, to_gguf, to_huggingface, to_pth
from rwkv_lab.convert.__main__ import main
from rwkv_lab.errors import HubError, LayoutError, ParameterError
from rwkv_lab.merge import extract_lora


@pytest.fixture
def source(tmp_path) -> Path:
    write_checkpoint(tmp_path / "model.pth", random_model(unused=True))
    return tmp_path / "model.pth"


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def card_of(repo) -> tuple[dict, str]:
    """(front matter, text)."""
    found = re.fullmatch(r"---\n(.*?)---\n(.*)", repo.files["README.md"].decode(), re.DOTALL)
    return yaml.safe_load(found[1]), found[2]


def test_a_new_private_repository(hub, token, source, tmp_path):
    result = to_huggingface(source, tmp_path / "out", push_to_hub=True, model_name="me/new", max_shard_size="9kB")
    assert all(check.passed for check in result.checks)
    assert "uploaded to me/new on the Hugging Face Hub, a new private repository" in " ".join(result.plan.notes)
    assert "no licence is stated; licence= states one" in " ".join(result.plan.notes)
    repo = hub.repos["me/new"]
    here = {path.name: path.read_bytes() for path in result.out.iterdir()}
    assert (
        repo.private
        and len(here) == 4
        and repo.messages[1:] == ["Upload config.json and model-00001-of-00002.safetensors by rwkv_lab 0.1.0"]
    )
    assert {name: repo.files[name] for name in here} == here and set(repo.files) == {
        *here,
        "README.md",
        ".gitattributes",
    }
    assert result.pushed.commit == list(repo.commits)[-1] and result.pushed.private
    assert f"{len(here) + 1} files were uploaded to me/new, which is private: {result.pushed.url}" in result.notes
    back = to_pth(repo_id="me/new", out=tmp_path / "back.pth")
    assert all(check.passed for check in back.checks)


def test_public_only_when_asked_for(hub, token, source, tmp_path):
    convert(source, "pth", tmp_path / "a.pth", push_to_hub=True, model_name="me/open", private=False)
    assert not hub.repos["me/open"].private and "a.pth" in hub.repos["me/open"].files
    with pytest.raises(HubError, match="me/open is a public repository; private=False uploads there"):
        convert(source, "pth", tmp_path / "b.pth", push_to_hub=True, model_name="me/open")
    assert not (tmp_path / "b.pth").exists()
    hub.add("me/closed", {}, private=True)
    pushed = push_to_hub(tmp_path / "a.pth", "me/closed", private=False)
    assert pushed.private and hub.repos["me/closed"].private


def test_an_existing_repository_keeps_its_files(hub, token, source, tmp_path):
    first = to_pth(source, tmp_path / "m.pth")
    same_file = first.out.read_bytes()
    hub.add(
        "me/there", {"m.pth": same_file, "README.md": b"mine", "other.pth": b"x", ".gitattributes": b""}, private=True
    )
    result = to_pth(source, tmp_path / "m.pth", overwrite=True, push_to_hub=True, model_name="me/there")
    assert (
        "the private repository, where files of the same names are replaced and the others of 4 stay"
        in result.notes[-4]
    )
    assert result.pushed.replaced == ("README.md",) and result.pushed.notes[1].startswith("Replaced there: README.md;")
    assert hub.asked("PUT") == []  # the Hub has that file
    files = hub.repos["me/there"].files
    assert files["other.pth"] == b"x" and files["m.pth"] == same_file and b"rwkv_lab" in files["README.md"]


def test_a_name_without_an_owner_is_of_the_own_account(hub, token, source):
    assert push_to_hub(source, "mine").repo_id == "me/mine" and "model.pth" in hub.repos["me/mine"].files


def test_readme_of_the_folder_goes_as_it_is(hub, token, source, tmp_path):
    to_huggingface(source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("written by hand")
    (tmp_path / "out" / ".hidden").write_text("not uploaded")
    pushed = push_to_hub(tmp_path / "out", "me/m")
    assert hub.repos["me/m"].files["README.md"] == b"written by hand" and ".hidden" not in pushed.files


def test_dry_run_uploads_nothing(hub, token, source, tmp_path):
    result = to_pth(source, tmp_path / "out.pth", dry_run=True, push_to_hub=True, model_name="me/new")
    assert "a new private repository" in result.notes[-2] and hub.repos == {}
    assert [request for request in hub.requests if not request.startswith("GET")] == []


def test_nothing_is_uploaded_where_a_check_fails(hub, token, source, tmp_path, monkeypatch):
    from rwkv_lab.checks import Check

    monkeypatch.setattr("rwkv_lab.convert.writing.verify_convert", lambda result: [Check("right", 1, 0, False)])
    result = to_pth(source, tmp_path / "out.pth", push_to_hub=True, model_name="me/new")
    assert result.pushed is None and hub.repos == {}
    assert result.notes[-1] == "Nothing was uploaded to me/new: not every check has passed."


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ({"pattern": "POST .*/commit/", "status": 500}, "could not answer the upload to me/new: its error 500"),
        ({"pattern": "POST .*/commit/", "status": 403}, "The token has no right to write to me"),
        (
            {"pattern": "POST .*/commit/", "status": 413, "body": {"error": "too large"}},
            r"refuses .* \(413\): too large",
        ),
        ({"pattern": "POST .*/commit/", "status": 429}, "over the limit; wait some minutes"),
        ({"pattern": "PUT /upload", "status": 403}, "no right to write to me"),
        ({"pattern": "POST .*/preupload", "status": 400, "body": {"error": "bad hf_tokenName"}}, r"\(400\): bad …"),
        ({"pattern": "POST .*/create", "status": 402, "body": {"error": "pay"}}, "its error 402"),
    ],
)
def test_a_push_that_fails_leaves_the_output(failure, message, hub, token, source, tmp_path):
    hub.fail(**failure)
    with pytest.raises(HubError, match=message) as e:
        to_pth(source, tmp_path / "out.pth", push_to_hub=True, model_name="me/new", licence="mit")
    lines = str(e.value).splitlines()
    again = f"rwkv_lab.convert.push_to_hub('{tmp_path / 'out.pth'}', 'me/new', licence='mit')"
    assert lines[1:] == [f"{tmp_path / 'out.pth'} is complete. To upload it again:", again] and TOKEN not in str(
        e.value
    )
    assert not any("out.pth" in repo.files for repo in hub.repos.values())
    hub.failures.clear()
    assert all(check.passed for check in eval(again, {"rwkv_lab": __import__("rwkv_lab.convert")}).checks)
    assert hub.repos["me/new"].files["out.pth"] == (tmp_path / "out.pth").read_bytes()


def test_what_arrives_otherwise_fails_a_check(hub, token, source, monkeypatch):
    from hub_stand_in import Repo

    commit = Repo.commit

    def damaging(repo, message):
        if "model.pth" in repo.files:
            repo.files["model.pth"] = repo.files["model.pth"][:-1] + b"?"
        return commit(repo, message)

    monkeypatch.setattr(Repo, "commit", damaging)
    failed = [check for check in push_to_hub(source, "me/new").checks if not check.passed]
    assert [check.name for check in failed] == ["files on the Hub that differ from those here, of 2, first model.pth"]


@pytest.mark.parametrize(
    ("set_to", "name", "message"),
    [
        ("", "me/new", "needs a token that may write: hf auth login, or the variable HF_TOKEN"),
        ("hf_expired1", "me/new", "does not accept the token"),
        ("hf_expired1", "new", "does not accept the token"),
        (READ_TOKEN, "me/new", "The token has no right to write to me"),
        (TOKEN, "other/new", "The token has no right to write to other"),
    ],
)
def test_tokens(set_to, name, message, hub, source, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", set_to)
    with pytest.raises(HubError, match=message) as e:
        push_to_hub(source, name)
    assert not set_to or set_to not in str(e.value).splitlines()[0]
    assert hub.repos == {}


def test_no_token_is_found_before_the_conversion(hub, source, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(HubError, match="needs a token that may write") as e:
        to_pth(source, tmp_path / "out.pth", push_to_hub=True, model_name="me/new")
    assert "is complete" not in str(e.value) and snapshot(tmp_path) == before and hub.requests == []


def test_no_network_and_offline(hub, token, source, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so the Hub is not asked for the upload to me/new"):
        push_to_hub(source, "me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError, match=r"The Hugging Face Hub \(127.0.0.1:9\) cannot be reached for the upload to me/new"
    ):
        push_to_hub(source, "me/new")


def test_what_is_no_checkpoint_is_not_uploaded(hub, token, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("private")
    with pytest.raises(LayoutError, match="holds none of"):
        push_to_hub(tmp_path / "notes", "me/new")
    with pytest.raises(ParameterError, match="there is no file"):
        push_to_hub(tmp_path / "none.pth", "me/new")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub=True needs model_name"),
        ({"model_name": "me/m"}, "where push_to_hub=True uploads to; it is not set"),
        ({"push_to_hub": True, "model_name": "me/m", "verify": False}, "only what has been verified is uploaded"),
        ({"push_to_hub": True, "model_name": "a/b/c"}, "it should be owner/name"),
        (
            {"push_to_hub": True, "model_name": "https://huggingface.co/me/m"},
            "the name of the repository alone is 'me/m'",
        ),
        ({"push_to_hub": "yes", "model_name": "me/m"}, "valid boolean"),
        ({"licence": "a\nb"}, "one line of printable"),
        ({"private": "no"}, "valid boolean"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ParameterError, match=message):
        ConvertOptions.read(given)


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        ("my own", r"licence='my own': the Hub has no licence of that name; it has apache-2.0, mit, .* and others"),
        ("Apache 2.0", r"licence='Apache 2.0': .*; did you mean apache-2.0\?\nAll names: .*licence='other'"),
        ("MIT", r"; did you mean mit\?"),
    ],
)
def test_a_licence_that_the_hub_does_not_know(licence, message, hub, token, source, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(ParameterError, match=message) as e:
        to_pth(source, tmp_path / "out.pth", push_to_hub=True, model_name="me/new", licence=licence)
    assert "is complete" not in str(e.value) and snapshot(tmp_path) == before
    with pytest.raises(ParameterError, match=message.partition(r"\n")[0]):
        push_to_hub(source, "me/new", licence=licence)
    assert hub.repos == {} and hub.asked("create") == []


def test_a_card_of_ones_own_that_the_hub_refuses(hub, token, source, tmp_path):
    folder = to_huggingface(source, tmp_path / "out").out
    (folder / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(HubError, match="refuses the model card: .*must be one of"):
        push_to_hub(folder, "me/new")
    assert hub.repos == {}


def test_a_hub_that_cannot_check_a_licence(hub, token, source, tmp_path):
    hub.fail("POST .*/validate", 500)
    with pytest.raises(HubError, match="its error 500"):
        to_pth(source, tmp_path / "out.pth", push_to_hub=True, model_name="me/new", licence="mit")
    assert hub.repos == {} and not (tmp_path / "out.pth").exists()


# The model card.


def test_card_of_a_merge_that_was_downloaded(hub, token, tmp_path):
    write_checkpoint(tmp_path / "base.pth", random_model(unused=True))
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    merged = merge(tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "merged.pth", alpha=8)
    repo = hub.add("owner/merged", {"merged.pth": merged.plan.out.read_bytes()})
    convert(repo_id="owner/merged", to="fla", out=tmp_path / "out", dtype="fp16", push_to_hub=True, model_name="me/it",
            licence="apache-2.0")  # fmt: skip
    front, text = card_of(hub.repos["me/it"])
    assert front == {
        "base_model": "owner/merged",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rwkv", "rwkv7", "fla", "rwkv_lab"],
    }
    inputs = {one.path.name: one.fingerprint for one in merged.inputs}
    for name, role in (("base.pth", "base"), ("lora.pth", "tuned")):
        assert re.search(rf"\n   - {role} `{name}`, .*B, `{inputs[name]}`", text)
    assert "1. Merged by `rwkv_lab 0.1.0`: method `lora`, alpha `8.0`" in text
    assert "2. Converted by `rwkv_lab 0.1.0`: to `fla`, dtype `fp16`" in text
    assert f"downloaded from `owner/merged`, commit `{list(repo.commits)[-1]}`" in text
    assert f"`merged.pth`, SHA-256 `{sha256(repo.files['merged.pth'])}`" in text
    assert "## Left out\n\n- `blocks.0.att.v0`, `blocks.0.att.v1`" in text
    assert "`apache-2.0`, as stated by who uploaded this." in text and "RWKV-7.0: 2 layers" in text
    assert "hf download me/it --local-dir it\n" in text and 'RWKV7ForCausalLM.from_pretrained("it")' in text
    assert "AutoTokenizer" not in text  # there is none


@pytest.mark.parametrize("target", ["fla", "pth"])
def test_a_merge_keeps_where_its_base_came_from(target, hub, token, tmp_path):
    """hub → convert → merge → merge → push; the tuned model's own repository is listed too, and no base."""
    for name in ("base", "tuned"):
        write_checkpoint(tmp_path / f"{name}.pth", random_model(seed=len(name)))
        hub.add(f"owner/{name}", {"m.pth": (tmp_path / f"{name}.pth").read_bytes()})
    repo = hub.repos["owner/base"]
    base = convert(repo_id="owner/base", to=target, out=tmp_path / ("b.pth" if target == "pth" else "b")).out
    tuned = to_pth(repo_id="owner/tuned", out=tmp_path / "t.pth").out
    write_checkpoint(tmp_path / "lora.pth", random_lora())
    first = merge(base, tmp_path / "lora.pth", tmp_path / "first.pth", alpha=8).out
    mixed = merge(first, tuned, tmp_path / "mixed.pth", method="linear", weights=[1, 1])
    assert all(check.passed for check in mixed.checks)
    push_to_hub(mixed.out, "me/mixed")
    front, text = card_of(hub.repos["me/mixed"])
    assert front["base_model"] == "owner/base" and "base_model_relation" not in front
    commit = list(repo.commits)[-1]
    assert f"\n     - downloaded from `owner/base`, commit `{commit}`\n       - `m.pth`, SHA-256" in text
    assert "\n     - downloaded from `owner/tuned`" in text
    merge(tmp_path / "base.pth", tuned, tmp_path / "other.pth", method="linear", weights=[1, 1])
    push_to_hub(tmp_path / "other.pth", "me/other")  # a base that came from nowhere
    assert "base_model" not in card_of(hub.repos["me/other"])[0]


def test_an_extracted_adapter_names_its_base(hub, token, tmp_path):
    key = "blocks.0.att.key.weight"
    write_checkpoint(tmp_path / "tuned.pth", random_model() | {key: random_model(seed=1)[key]})
    write_checkpoint(tmp_path / "base.pth", random_model())
    hub.add("owner/base", {"m.pth": (tmp_path / "base.pth").read_bytes()})
    base = to_pth(repo_id="owner/base", out=tmp_path / "b.pth").out
    extract_lora(base, tmp_path / "tuned.pth", tmp_path / "lora.pth", rank=2)
    convert(tmp_path / "lora.pth", "safetensors", tmp_path / "lora")
    for path, name in ((tmp_path / "lora.pth", "me/file"), (tmp_path / "lora", "me/folder")):
        push_to_hub(path, name)
        front = card_of(hub.repos[name])[0]
        assert (front["base_model"], front["base_model_relation"]) == ("owner/base", "adapter")


def test_card_without_a_licence_or_a_base(hub, token, source):
    push_to_hub(source, "me/m")
    front, text = card_of(hub.repos["me/m"])
    assert "license" not in front and "base_model" not in front and "No licence is stated." in text
    assert "`model.pth` does not state how it was made." in text
    assert "hf download me/m model.pth --local-dir ." in text and 'RWKV_Dual.from_pretrained("model.pth")' in text


def test_cards_of_other_kinds(hub, token, tmp_path):
    write_checkpoint(tmp_path / "lora.pth", random_lora(full=False))
    convert(tmp_path / "lora.pth", "safetensors", tmp_path / "lora", alpha=8)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "owner/base"}))
    push_to_hub(tmp_path / "lora", "me/lora")
    front, text = card_of(hub.repos["me/lora"])
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "owner/base",
        "adapter",
        "peft",
    )
    assert 'PeftModel.from_pretrained(model, "lora")' in text
    write_checkpoint(tmp_path / "state.pth", random_state())
    push_to_hub(tmp_path / "state.pth", "me/state")
    front, text = card_of(hub.repos["me/state"])
    assert front["tags"] == ["rwkv", "pth", "state", "rwkv_lab"] and "State of RWKV" in text


def test_card_of_a_quantised_file(hub, token, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from random_models import make_layout, write_model

    write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=256))
    hub.add("owner/m", {"m.pth": (tmp_path / "m.pth").read_bytes()})
    to_gguf(repo_id="owner/m", out=tmp_path / "m.gguf", dtype="Q8_0", push_to_hub=True, model_name="me/q")
    front, text = card_of(hub.repos["me/q"])
    assert (front["base_model"], front["base_model_relation"], front["library_name"]) == (
        "owner/m",
        "quantized",
        "gguf",
    )
    assert 'Llama("m.gguf' in text.replace("model_path=", "") and "in Q8_0" in text


def test_a_provenance_by_others_is_no_markup(hub, token, tmp_path):
    from safetensors.torch import save_file

    record = {
        "made_by": "<script>`x`\n# Title",
        "job": "<b>",
        "inputs": [{"name": "`](http://evil)\n---", "bytes": "many"}, 3],
        "recipe": [],
        "dropped": {"<img>": ["`a`"], "b": 7},
        "downloaded": {"repo_id": "x: [y\n", "files": [None, {"name": 5}]},
        "source": {"source": "x"},
    }
    save_file(random_model(), tmp_path / "m.safetensors", {"rwkv_lab.json": json.dumps(record)})
    push_to_hub(tmp_path / "m.safetensors", "me/m")
    front, text = card_of(hub.repos["me/m"])
    assert "base_model" not in front and "\n# Title" not in text
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "<" not in plain and "`" not in plain and "evil" not in plain


def test_the_command(hub, token, source, tmp_path, capsys):
    words = ["--source", str(source), "--to", "pth", "--push-to-hub", "--model-name", "me/m", "--no-private"]
    words += ["--licence", "mit", "--out"]
    assert main([*words, str(tmp_path / "a.pth")]) == 0
    assert "files were uploaded to me/m, which is public" in capsys.readouterr().out
    assert card_of(hub.repos["me/m"])[0]["license"] == "mit" and not hub.repos["me/m"].private
    hub.fail("/commit/", 503)
    assert main([*words, str(tmp_path / "b.pth")]) == 1 and (tmp_path / "b.pth").exists()
    said = "".join(capsys.readouterr())
    assert (
        "HubUnreachableError: The Hub could not answer the upload to me/m: its error 503" in said and TOKEN not in said
    )
