"""Sources on the Hugging Face Hub: huggingface_hub itself, against a stand-in over HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, sha256
from models import LAYOUTS, random_lora, random_model, same, snapshot
from random_models import make_layout, write_model

from rwkv_lab.checkpoint import open_checkpoint, write_checkpoint
from rwkv_lab.convert import ConvertSpec, compare_logits, convert, download, to_huggingface, to_pth
from rwkv_lab.errors import CorruptFileError, HubError, LayoutError, OutputError, ParameterError, UnsafeFileError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def model(tmp_path) -> bytes:
    write_checkpoint(tmp_path / "model.pth", random_model(unused=True))
    return (tmp_path / "model.pth").read_bytes()


def folder_files(folder: Path, inside: str = "") -> dict[str, bytes]:
    return {inside + path.name: path.read_bytes() for path in folder.iterdir()}


def record_of(path) -> dict:
    with open_checkpoint(path) as ck:
        return json.loads(ck.metadata["rwkv_lab.json"])


def test_a_file_is_downloaded_once_and_recorded(hub, model, tmp_path):
    repo = hub.add("owner/models", {"old/a.pth": b"x" * 10, "old/B.pth": model, "README.md": b""})
    result = convert(repo_id="owner/models", file="old/B.pth", to="fla", out=tmp_path / "out")
    assert all(check.passed for check in result.checks) and len(hub.asked("GET /stored")) == 1
    assert compare_logits(result).passed
    commit = list(repo.commits)[-1]
    assert result.notes[0].startswith(f"The source is owner/models on the Hugging Face Hub, commit {commit[:12]}: ")
    record = record_of(result.out)
    file = {"name": "old/B.pth", "bytes": len(model), "sha256": sha256(model)}
    assert record["downloaded"] == {"repo_id": "owner/models", "commit": commit, "files": [file]}
    assert record["inputs"][0]["name"] == "B.pth" and "repo_id" not in record["recipe"]
    again = to_pth(repo_id="owner/models", file="old/B.pth", out=tmp_path / "again.pth")
    assert len(hub.asked("GET /stored")) == 1 and "from the cache of earlier downloads" in again.notes[0]
    assert [name for name, _ in snapshot(tmp_path / "cache").items() if ".incomplete" in str(name)] == []


def test_the_same_bytes_come_from_the_cache_and_from_a_file(hub, model, tmp_path):
    hub.add("owner/models", {"model.pth": model})
    for name in ("a.pth", "b.pth"):
        to_pth(repo_id="owner/models", out=tmp_path / name)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    here = to_pth(tmp_path / "model.pth", tmp_path / "c.pth")
    with open_checkpoint(tmp_path / "a.pth") as a, open_checkpoint(here.out) as c:
        assert all(same(a[name], c[name]) for name in c)
    del (there := record_of(tmp_path / "a.pth"))["downloaded"]
    assert there == record_of(here.out)


def test_only_what_a_sharded_folder_needs(hub, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model())
    made = convert(tmp_path / "m.pth", "fla", tmp_path / "shards", max_shard_size="3kB")
    files = folder_files(made.out) | {"pytorch_model.bin": b"not needed", "README.md": b"x", "onnx/model.onnx": b"x"}
    hub.add("owner/shards", files)
    result = to_pth(repo_id="owner/shards", out=tmp_path / "back.pth")
    fetched = {request.rpartition("/")[2] for request in hub.asked("HEAD .*/resolve/")}
    shards = {name for name in files if name.startswith("model-0")}
    assert len(shards) > 2 and fetched == shards | {"config.json", "model.safetensors.index.json"}
    assert all(check.passed for check in result.checks)
    with open_checkpoint(tmp_path / "m.pth") as m, open_checkpoint(result.out) as back:
        assert all(same(m[name], back[name]) for name in m)
    by_index = download("owner/shards", "model.safetensors.index.json")
    assert by_index.path == download("owner/shards").path and by_index.fetched == 0


def test_the_chat_template_of_a_folder_comes_along_and_its_licence_is_told(hub, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model())
    folder = convert(tmp_path / "m.pth", "fla", tmp_path / "folder").out
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.add("owner/f", files | {"chat_template.jinja": b"{{ messages }}", "LICENSE": b"words", "README.md": b"x"})
    result = convert(None, "gguf", tmp_path / "m.gguf", repo_id="owner/f")
    assert any("own chat template goes along" in note for note in result.notes)
    assert any("LICENSE of the source stays behind" in note for note in result.notes)


def test_a_list_of_files_that_leads_out_of_the_repository(hub, tmp_path):
    hub.add("owner/odd", {"../../../odd.safetensors": b"x"})
    for dry_run in (True, False):
        with pytest.raises(UnsafeFileError, match="'../../../odd.safetensors', outside its repository"):
            convert(None, "pth", tmp_path / "o.pth", repo_id="owner/odd", dry_run=dry_run)


def test_a_folder_inside_a_repository_and_an_adapter(hub, tmp_path):
    write_checkpoint(tmp_path / "lora.pth", random_lora(full=False))
    convert(tmp_path / "lora.pth", "safetensors", tmp_path / "lora", alpha=8)
    hub.add("owner/lora", folder_files(tmp_path / "lora", "runs/7/") | {"runs/6/adapter_config.json": b"{}"})
    result = convert(repo_id="owner/lora", file="runs/7/", to="pth", out=tmp_path / "again.pth")
    assert result.plan.kind == "lora" and all(check.passed for check in result.checks)


@pytest.mark.parametrize("version", ["4.0", "7.0"])
def test_to_huggingface_takes_the_target_of_the_generation(version, hub, tmp_path):
    write_checkpoint(tmp_path / "m.pth", random_model(LAYOUTS[version]))
    hub.add("owner/m", {"m.pth": (tmp_path / "m.pth").read_bytes()})
    result = to_huggingface(repo_id="owner/m", out=tmp_path / "out")
    assert result.plan.spec.to == {"4.0": "transformers", "7.0": "fla"}[version]
    assert all(check.passed for check in result.checks)


def test_revisions(hub, model, tmp_path):
    repo = hub.add("owner/m", {"m.pth": model})
    first = list(repo.commits)[-1]
    write_checkpoint(tmp_path / "other.pth", random_model(seed=5))
    repo.files["m.pth"] = (tmp_path / "other.pth").read_bytes()
    repo.commit("another model")
    old, new = download("owner/m", revision=first), download("owner/m")
    assert old.commit == first != new.commit and old.path.read_bytes() == model != new.path.read_bytes()
    with pytest.raises(ParameterError, match="owner/m has no such revision"):
        download("owner/m", revision="v2")


def test_a_private_repository_needs_the_token(hub, model, monkeypatch):
    hub.add("me/secret", {"m.pth": model}, private=True)
    with pytest.raises(HubError, match="no model repository me/secret, or it is private, which needs a token: hf auth"):
        download("me/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert download("me/secret").path.read_bytes() == model
    assert len(hub.asked("GET /stored")) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_outOfDate")
    with pytest.raises(HubError, match="does not accept the token: it is wrong, or has expired") as e:
        download("me/secret")
    assert "hf_outOfDate" not in str(e.value)


def test_what_is_not_there(hub, model, monkeypatch):
    hub.add("owner/m", {"RWKV-x070-0.1B.pth": model, "old/RWKV-x070-0.4B.pth": model, "README.md": b""})
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match="The Hub has no model repository owner/n, or it is private"):
            download("owner/n")
    with pytest.raises(ParameterError, match="has no RWKV-x070-0.2B.pth; did you mean RWKV-x070-0.1B.pth, old/RWKV-x"):
        download("owner/m", "RWKV-x070-0.2B.pth")
    with pytest.raises(ParameterError, match="holds 2 checkpoints; say which by file=:\nRWKV-x070-0.1B.pth, old/RWKV"):
        download("owner/m")
    with pytest.raises(ParameterError, match="has no none; it has RWKV-x070-0.1B.pth"):
        download("owner/m", "none")
    assert download("owner/m", "old").path.name == "RWKV-x070-0.4B.pth"
    hub.add("owner/text", {"README.md": b"", "data/a.txt": b"x"})
    with pytest.raises(LayoutError, match="owner/text on the Hub holds no checkpoint: README.md, data/a.txt"):
        download("owner/text")
    hub.add("owner/parts", {"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'})
    with pytest.raises(LayoutError, match="names shards that are not in owner/parts: model-1.safetensors"):
        download("owner/parts")
    hub.add("owner/out", {"model.safetensors.index.json": b'{"weight_map": {"a": "../../x"}}'})
    with pytest.raises(UnsafeFileError, match="names the shard '../../x', which is outside its folder"):
        download("owner/out")
    hub.add("owner/bad", {"model.safetensors.index.json": b"[1]"})
    with pytest.raises(CorruptFileError, match="holds a list, not an object"):
        download("owner/bad")


def test_a_gated_repository(hub, model, monkeypatch):
    hub.add("owner/gated", {"m.pth": model}, gated=True)
    with pytest.raises(HubError, match="owner/gated is gated, and anybody without a token is not let in.\nAsk for acc"):
        download("owner/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="is gated, and the account of this token is not let in"):
        download("owner/gated")


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (
            429,
            {"Retry-After": "42"},
            "limits how often it may be asked, .*; wait 42 seconds.\nThe limit is higher",
        ),
        (429, {"RateLimit": '"api";r=0;t=7'}, "wait 7 seconds"),
        (429, {}, "wait some minutes"),
        (403, {}, "The token has no right to read owner/m"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, "owner/m was disabled by the Hub"),
        (500, {}, "could not answer the list of files of owner/m: its error 500. Try again later"),
        (503, {}, "its error 503"),
        (418, {}, "The Hub refuses the list of files of owner/m: its error 418"),
    ],
)
def test_answers_in_words(status, headers, message, hub, model, tmp_path):
    hub.add("owner/m", {"m.pth": model})
    hub.fail("/api/models/", status, headers=headers)
    before = snapshot(tmp_path)
    with pytest.raises(HubError, match=message) as e:
        to_pth(repo_id="owner/m", out=tmp_path / "out.pth")
    assert len(str(e.value).splitlines()) <= 3 and snapshot(tmp_path) == before


def test_a_download_is_shown_by_its_name_alone(hub, model, caplog, capfd, monkeypatch):
    monkeypatch.setattr("rwkv_lab.progress.LOG_AFTER", 0)
    hub.add("owner/m", {"folder/m.pth": model})
    with caplog.at_level("INFO", "rwkv_lab"):
        download("owner/m")
    assert caplog.messages[0].startswith("owner/m: downloading ") and caplog.messages[-1].startswith("m.pth: 100 % (")
    said = "".join(capfd.readouterr())
    assert "stored" not in said and "Signature" not in said


def test_a_connection_that_breaks_off_is_taken_up_again(hub, model):
    hub.add("owner/m", {"m.pth": model})
    hub.fail("GET /stored", after=1000, times=2)
    assert download("owner/m").path.read_bytes() == model
    assert len(hub.asked("GET /stored")) == 3


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ({"after": 0}, HubError, "The connection to .* broke off during the download of m.pth"),
        ({"damage": True}, CorruptFileError, "m.pth of owner/m has another SHA-256 than the Hub states"),
        ({"status": 404}, HubError, "The Hub refuses the download of m.pth: its error 404"),
        ({"status": 403}, HubError, "no right to read owner/m"),
    ],
)
def test_a_download_that_fails_leaves_nothing(failure, error, message, hub, model, tmp_path):
    hub.add("owner/m", {"m.pth": model})
    hub.fail("GET /stored", **failure)
    for _ in range(2):  # the second time, too: nothing damaged lies in the cache
        with pytest.raises(error, match=message) as e:
            to_pth(repo_id="owner/m", out=tmp_path / "out.pth")
        assert "secret" not in str(e.value) and len(str(e.value).splitlines()) <= 3
        left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 1000]
        assert left == [] and not (tmp_path / "out.pth").exists()
    hub.failures.clear()
    assert all(check.passed for check in to_pth(repo_id="owner/m", out=tmp_path / "out.pth").checks)


def test_a_server_that_is_no_hub(hub, model, monkeypatch):
    hub.fail("/api/models", 200, body={"hello": "world"})
    with pytest.raises(HubError, match="failed in huggingface_hub"):
        download("owner/m")


def test_without_network_the_cache_stands_in(hub, model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub.add("owner/m", {"m.pth": model, "n.pth": model + b"x"})
    first = download("owner/m", "m.pth")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    again = download("owner/m", "m.pth")
    assert (again.path, again.files, again.commit) == (first.path, first.files, first.commit)
    assert "The Hugging Face Hub (127.0.0.1:9) cannot be reached" in again.notes[1]
    with pytest.raises(ParameterError, match="has no n.pth in the cache; did you mean m.pth"):
        download("owner/m", "n.pth")
    with pytest.raises(HubError) as e:
        download("owner/other")
    assert "The Hugging Face Hub (127.0.0.1:9) cannot be reached for the list of files of owner/other" in str(e.value)
    assert "refused" in str(e.value) and len(str(e.value).splitlines()) == 2


def test_offline_mode(hub, model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    write_checkpoint(tmp_path / "m.pth", random_model())
    convert(tmp_path / "m.pth", "fla", tmp_path / "shards", max_shard_size="9kB")
    hub.add("owner/shards", folder_files(tmp_path / "shards"))
    download("owner/shards")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = to_pth(repo_id="owner/shards", out=tmp_path / "offline.pth")
    assert all(check.passed for check in result.checks) and hub.requests == []
    assert "HF_HUB_OFFLINE is set, so the Hub is not asked" in " ".join(result.notes)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so the Hub is not asked"):
        download("owner/m")
    shard = next(path for path in download("owner/shards").path.iterdir() if path.name.startswith("model-0"))
    shard.unlink()
    with pytest.raises(LayoutError, match=f"names shards that are not in the cache: {shard.name}"):
        download("owner/shards")


def test_a_rate_limit_does_not_stand_in_the_way_of_the_cache(hub, model):
    hub.add("owner/m", {"m.pth": model})
    download("owner/m")
    hub.fail("/api/models", 429)
    assert "over the limit" in download("owner/m").notes[1]
    hub.failures.clear()
    hub.fail("/api/models", 401)
    with pytest.raises(HubError, match="no model repository"):
        download("owner/m")


def test_a_disk_that_is_too_small(hub, model, monkeypatch):
    hub.add("owner/m", {"m.pth": model})
    monkeypatch.setattr("rwkv_lab.convert.hub_download.disk_free", lambda folder: 1000)
    with pytest.raises(OutputError, match="are to be downloaded, 1 kB are free on the disk of .*\nHF_HOME names"):
        download("owner/m")
    assert hub.asked("/resolve/") == []


def test_an_output_that_cannot_be_is_refused_before_a_download(hub, model, tmp_path):
    hub.add("owner/m", {"m.pth": model})
    (tmp_path / "there.pth").write_bytes(b"x")
    with pytest.raises(OutputError, match="there.pth exists"):
        to_pth(repo_id="owner/m", out=tmp_path / "there.pth")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "source is missing: a file or folder on this disk; or repo_id, a model on the Hub"),
        ({"source": "m.pth", "repo_id": "owner/m"}, "give one of them"),
        ({"source": "m.pth", "file": "m.pth"}, "file and revision are of a repository"),
        ({"source": "m.pth", "revision": "main"}, "file and revision are of a repository"),
        ({"repo_id": "a/b/c"}, "it should be owner/name"),
        ({"repo_id": "what is this"}, "it should be owner/name"),
        ({"repo_id": 3}, "it should be a valid string"),
        ({"repo_id": "owner/m", "file": "a\nb"}, "one line of printable"),
        (
            {"repo_id": "https://huggingface.co/owner/m"},
            "it is an address: the name of the repository alone is 'owner/m'",
        ),
        ({"source": "hf://owner/m/a/b.pth"}, "leave it out and give repo_id='owner/m', file='a/b.pth'"),
        (
            {"source": "https://huggingface.co/owner/m/resolve/v2/b.pth?download=true"},
            "give repo_id='owner/m', file='b.pth', revision='v2'",
        ),
        ({"source": "https://huggingface.co/owner/m/blob/main/b.pth"}, "give repo_id='owner/m', file='b.pth'$"),
        ({"source": "https://example.org/b.pth"}, "it is an address; download it first"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ParameterError, match=message):
        ConvertSpec.read(given | {"to": "pth"})


def test_the_name_of_a_repository_as_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ParameterError, match="there is no file .*/owner/m.*\nA model on .* by repo_id='owner/m' in place"
    ):
        to_pth("owner/m", tmp_path / "out.pth")


@pytest.mark.parametrize("name", ["-m", "a..b", "owner/m.git", "owner/" + "x" * 100])
def test_names_that_the_hub_does_not_take(name, hub):
    with pytest.raises((ParameterError, HubError), match="no name of a repository|no model repository"):
        download(name)


def test_the_package_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ParameterError, match="needs the package huggingface_hub.\nInstall it: pip install"):
        download("owner/m")


def run(warm, environment, *words):
    command = [warm.python, "-m", "rwkv_lab.convert", *words]
    return subprocess.run(command, env=warm.environment | environment, capture_output=True, text=True)


def test_the_command_goes_by_the_variables_of_the_hub(hub, warm, environment, model, tmp_path):
    hub.add("me/m", {"m.pth": model}, private=True)
    words = ["--repo-id", "me/m", "--file", "m.pth", "--to", "pth", "--out", str(tmp_path / "out.pth")]
    done = run(warm, environment | {"HF_TOKEN": TOKEN}, *words)
    assert done.returncode == 0 and "The source is me/m on the Hugging Face Hub" in done.stdout, done.stderr
    assert TOKEN not in done.stdout + done.stderr and "X-Signature" not in done.stdout + done.stderr
    assert list((tmp_path / "home" / "hub" / "models--me--m").iterdir())
    nowhere = environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
    done = run(warm, nowhere, *words, "--overwrite")
    assert done.returncode == 1 and "The Hugging Face Hub (127.0.0.1:9) cannot be reached" in done.stderr
    assert done.stderr.count("\n") <= 3 and "Traceback" not in done.stderr


# A dry run reads headers alone.


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 12 MB as .pth, sharded folder and GGUF."""
    folder = tmp_path_factory.mktemp("large")
    write_model(folder / "m.pth", make_layout("7.0", n_layer=4, n_head=4, head_size=64, dim_ffn=1024, vocab_size=256))
    convert(folder / "m.pth", "fla", folder / "shards", max_shard_size="4MB")
    return folder


def sent(hub) -> int:
    return sum(hub.sent)


@pytest.mark.parametrize("kind", ["pth", "folder", "safetensors", "gguf"])
def test_dry_run_reads_headers_alone(kind, hub, large, tmp_path):
    if kind == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    if kind in ("gguf", "safetensors"):
        convert(large / "m.pth", kind, tmp_path / f"m.{kind}")
    path = {"pth": large / "m.pth", "folder": large / "shards"}.get(kind, tmp_path / f"m.{kind}")
    files = folder_files(path) if path.is_dir() else {path.name: path.read_bytes()}
    hub.add("owner/m", files)
    size = sum(map(len, files.values()))
    there = to_pth(repo_id="owner/m", out=tmp_path / "out.pth", dry_run=True).plan
    here = to_pth(path, tmp_path / "out.pth", dry_run=True).plan
    assert there.rows == here.rows and there.layout == here.layout
    assert kind == "gguf" or sent(hub) < 0.8 * size
    assert "will be downloaded; only headers were read" in there.notes[0]
    assert kind != "pth" or there.source.fingerprint == here.source.fingerprint
    assert kind == "pth" or there.source.fingerprint == "records:" + "?" * 64
    assert not any(p.stat().st_size > 2**20 for p in (tmp_path / "cache").rglob("*") if p.is_file())
    real = to_pth(repo_id="owner/m", out=tmp_path / "out.pth")
    assert all(check.passed for check in real.checks) and real.plan.output_bytes == there.output_bytes
    again = to_pth(repo_id="owner/m", out=tmp_path / "again.pth", dry_run=True)
    assert "from the cache of earlier downloads" in again.notes[0]


def test_to_huggingface_plans_from_headers(hub, large, tmp_path):
    hub.add("owner/m", {"m.pth": (large / "m.pth").read_bytes()})
    result = to_huggingface(repo_id="owner/m", out=tmp_path / "out", dry_run=True)
    assert result.plan.spec.to == "fla" and "only headers were read" in result.notes[0]


def test_a_server_without_ranges_and_damaged_headers(hub, large, tmp_path):
    data = (large / "m.pth").read_bytes()
    hub.add("owner/m", {"m.pth": data, "n.pth": data[:-30] + bytes(30), "text.pth": b"text " * 300_000})
    with pytest.raises(CorruptFileError, match="text.pth is neither"):
        to_pth(repo_id="owner/m", file="text.pth", out=tmp_path / "out.pth", dry_run=True)
    with pytest.raises(CorruptFileError, match="its zip directory cannot be read"):
        to_pth(repo_id="owner/m", file="n.pth", out=tmp_path / "out.pth", dry_run=True)
    hub.ranges = False
    result = to_pth(repo_id="owner/m", file="m.pth", out=tmp_path / "out.pth", dry_run=True)
    assert "were downloaded" in result.notes[0] and not (tmp_path / "out.pth").exists()
