"""chat.ipynb without a browser: models beside each other, prompts from files, the box to write in, refusals."""

import json
import threading
import time

import pytest
import torch
from models import random_state
from random_models import make_layout, write_model
from tuned_files import write_adapter

from rwkv_lab.analysis.answers import Speaker, load_to_ask, read_prompts
from rwkv_lab.errors import CorruptFileError, LayoutError, OutputError, ParameterError
from rwkv_lab.merge import merge
from rwkv_lab.model import RWKV_Dual, generate_stream, quantise_weights
from rwkv_lab.workbench import start
from rwkv_lab.workbench.chat.conversation import Conversation
from rwkv_lab.workbench.job import Job
from rwkv_lab.workbench.steps import run_all


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a tuned state and a LoRA of it."""
    folder, layout = tmp_path_factory.mktemp("chat"), make_layout("7.0", head_size=32, vocab_size=256)
    base = write_model(folder / "B.pth", layout)
    state, lora = folder / "state.pth", folder / "lora.pth"
    torch.save(random_state(layout), state)
    write_adapter(lora, base)
    return {"model": str(base), "state": str(state), "adapter": str(lora)}


def done(tmp_path, **given) -> dict:
    run_all(start("chat", given | {"report": str(tmp_path / "report")}))
    return json.loads((tmp_path / "report" / "result.json").read_text())


def answers(tmp_path) -> list:
    return json.loads((tmp_path / "report" / "answers.json").read_text())


def test_two_settings_on_the_same_prompt_and_seed(files, tmp_path):
    result = done(tmp_path, model=files["model"], prompt="ab", max_new_tokens=8, second={"temperature": 0.5})
    assert result["status"] == "ok" and [c["passed"] for c in result["checks"]] == [True, True]
    (asked,) = answers(tmp_path)
    model = RWKV_Dual.from_pretrained(files["model"])
    for answer, temperature in zip(asked["answers"], (1.0, 0.5), strict=True):
        stream = generate_stream(model, "ab", 8, temperature=temperature)
        assert answer["text"] == "".join(text for _, text in stream) and answer["ended_by"] == "max_new_tokens"
    assert asked["answers"][1]["by"] == "temperature 0.5"
    assert "2 answers each: 16 tokens" in result["metrics"]["summary"]


def test_a_state_an_adapter_and_rounded_weights(files, tmp_path):
    tokens = torch.tensor([[1, 2, 3]])
    merged = merge(files["model"], files["adapter"], tmp_path / "merged.pth").out
    expected = RWKV_Dual.from_pretrained(merged)
    expected.load_state_file(files["state"])
    asked = load_to_ask(files["model"], files["state"], files["adapter"])
    # one matrix product instead of two that are added: a few units in the last place of float32
    torch.testing.assert_close(asked(tokens)[0], expected(tokens)[0], rtol=1e-4, atol=1e-4)
    rounded = load_to_ask(files["model"], files["state"], files["adapter"], "int8")
    torch.testing.assert_close(rounded(tokens)[0], quantise_weights(expected)(tokens)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "text, questions",
    [
        ("one\n\ntwo\n", ["one", "two"]),
        ('["one", {"prompt": "two"}]', ["one", "two"]),
        (
            '{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "x"}',
            [[{"role": "user", "content": "hi"}], "x"],
        ),
    ],
)
def test_prompts_of_a_file(tmp_path, text, questions):
    (tmp_path / "p").write_text("\ufeff" + text)
    assert read_prompts(tmp_path / "p") == questions


@pytest.mark.parametrize(
    "content, error, words",
    [
        (b"", ParameterError, "asks nothing"),
        (b"\xff\xfe", CorruptFileError, "byte 0"),
        (b"[1]", CorruptFileError, "entry 1: 1 is neither"),
        (b'{"prompt": "x", "messages": []}', CorruptFileError, "line 1: it must have either"),
        (b'{"prompt": "x"}\n{', CorruptFileError, "line 2: it is no JSON"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, content, error, words):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(error, match=words):
        read_prompts(tmp_path / "p")
    with pytest.raises(ParameterError, match="there is no file"):
        read_prompts(tmp_path / "none")


def test_conversations_of_a_file(files, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    (tmp_path / "p.json").write_text(json.dumps([messages]))
    done(tmp_path, model=files["model"], prompts=str(tmp_path / "p.json"), max_new_tokens=4, seed=None)
    (asked,) = answers(tmp_path)
    assert asked["messages"] == messages and asked["answers"][0]["tokens"] <= 4


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"second": {"temprature": 1}}, ParameterError, "temprature.*temperature"),
        ({"second": {"top_p": 2}}, ParameterError, "second: .*top_p"),
        ({"weights": "int3"}, ParameterError, "int8"),
        ({"adapter": "state"}, ParameterError, "is a tuned state: give it as state"),
        ({"adapter": "model"}, ParameterError, "is a whole model: give it as model"),
        ({"state": "model"}, LayoutError, "holds no tuned state: it is of kind 'model'"),
        ({"state": "adapter"}, LayoutError, "holds no tuned state: it is of kind 'lora'"),
        ({"second": {"state": "model"}}, LayoutError, "holds no tuned state"),
        ({"model": "state"}, LayoutError, "state"),
    ],
)
def test_what_is_refused(files, tmp_path, given, error, words):
    second = {name: files.get(value, value) for name, value in given.get("second", {}).items()}
    given = {name: files.get(value, value) for name, value in given.items() if name != "second"} | {"second": second}
    with pytest.raises(error, match=words):
        done(tmp_path, **{"model": files["model"]} | given)


def test_an_output_that_is_there_is_kept(files, tmp_path):
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(OutputError, match=r"a\.json is there already"):
        done(tmp_path, model=files["model"], out=str(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_text() == "mine"


@pytest.fixture
def box(files, tmp_path):
    run = start("chat", {"model": files["model"], "conversation": True, "report": str(tmp_path)})
    speakers = [Speaker(name, load_to_ask(files["model"]), {"max_new_tokens": 6}) for name in ("one<b>", "two")]
    return Conversation(run, speakers)


def test_the_box_to_write_in(box):
    box.text.value = "hi <i>"
    box.send.click()
    assert [m["role"] for m in box.said["two"]] == ["user", "assistant"]
    shown = box.shown["one<b>"].value
    assert "hi &lt;i&gt;" in shown and "one&lt;b&gt;" in shown and box.text.value == ""
    box.text.value = "more"
    box.send.click()
    assert len(box.said["one<b>"]) == 4
    box.new.click()
    assert not box.said["two"] and "hi" not in box.shown["two"].value
    box.send.click()
    assert "nothing to answer" in box.message.value


def test_stop_ends_what_is_being_written(box):
    box.speakers[0].settings["max_new_tokens"] = 100_000
    box.speakers[0].model.tokenizer.end_of_text = None
    box.speakers[0].settings["stop"] = ["\u2603"]
    box.text.value = "go"
    writing = threading.Thread(target=box.send.click)  # without a kernel a job runs where it is started
    writing.start()
    while not any(box._found.values()):
        time.sleep(0.01)
    assert box.send.disabled and not box.stop.disabled
    box.stop.click()
    writing.join()
    assert not box.send.disabled and box.stop.disabled
    assert len(box.said["one<b>"]) == 2 and not box.said["two"]


def test_an_interrupt_leaves_what_is_written(box, monkeypatch):
    def writes(question, told):
        told(1, "so far")
        box.end()
        raise KeyboardInterrupt

    monkeypatch.setattr(box.speakers[0], "answer", writes)
    box.text.value = "go"
    box.send.click()
    assert [m["content"] for m in box.said["one<b>"]] == ["go", "so far"] and not box.said["two"]
    assert box.message.value == "stopped" and not box.send.disabled and box.stop.disabled
    box.new.click()
    assert box.message.value == "" and not box.said["one<b>"]


def test_the_box_waits_for_the_job_of_a_panel(box):
    box.text.value = "go"
    Job(box.send.click, lambda: None, lambda error: None).start()
    assert "is at work" in box.message.value and not box.send.disabled and not box.said["two"]
    box.send.click()
    assert len(box.said["two"]) == 2
