"""Texts that end a generation, the callback that ends it, and what is known of it then."""

import numpy as np
import pytest
import torch
from random_rwkv7 import make_model

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import StateCache, generate, generate_stream
from rwkv_lab.tokenizer.stopping import StopText, stop_texts


def shown(text: str, stops: list[str], size: int) -> tuple[list[str], str | None]:
    """The pieces that are let through of a text that comes in pieces of `size`, and the stop that was found."""
    filtered = StopText(stop_texts(stops))
    pieces = []
    for at in range(0, len(text), size):
        pieces.append(filtered.feed(text[at : at + size]))
        if filtered.found is not None:
            return pieces, filtered.found
    return [*pieces, filtered.close()], None


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "before", "found"),
    [
        ("one\n\ntwo", ["\n\n", "User:"], "one", "\n\n"),
        ("one\nUser: two", ["\n\n", "User:"], "one\n", "User:"),
        ("one\nUseful", ["\n\n", "User:"], "one\nUseful", None),
        ("aab", ["ab"], "a", "ab"),
        ("aaab", ["aab"], "a", "aab"),
        ("xabcx", ["abc", "b"], "xa", "b"),  # complete before the longer one
        ("日本語", ["本語"], "日", "本語"),
        ("one", [], "one", None),
        ("on", ["one"], "on", None),
    ],
)
def test_a_stop_is_found_however_the_text_comes(text, stops, before, found, size):
    pieces, which = shown(text, stops, size)
    assert ("".join(pieces), which) == (before, found)


def test_no_beginning_of_a_stop_is_shown_before_it_is_decided():
    assert shown("a\n\n", ["\n\n"], 1)[0] == ["a", "", ""]
    assert shown("a\nb", ["\n\n"], 1)[0] == ["a", "", "\nb", ""]


def free_text(model, **how) -> str:
    return generate(model, ["x"], 60, temperature=1.0, top_p=1.0, seed=3, **how)[0]


def test_stops_of_any_kind_of_iterable():
    model = make_model()
    text = free_text(model)
    stop = text[20:23]
    expected = text[: text.index(stop)]
    for stops in (stop, [stop], (stop,), {stop}, iter([stop]), {stop: 1}.keys()):
        assert free_text(model, stop=stops) == expected
    assert free_text(model, stop=None) == free_text(model, stop=()) == text
    ids = list(generate_stream(model, "x", 60, top_p=1.0, seed=3))
    token = ids[20][0]
    for tokens in (token, [token], {token}, iter([token]), torch.tensor([token])):
        assert free_text(model, stop_tokens=tokens) == free_text(model, stop_tokens=[token]) != text


def test_a_stream_says_how_it_ended():
    model = make_model(dtype=torch.float64)
    stream = generate_stream(model, "x", 30, seed=3, top_p=1.0)
    pairs = list(stream)
    assert [token for token, _ in pairs] == stream.ids and "".join(text for _, text in pairs) == stream.text
    assert stream.reason == "max_new_tokens" and len(stream.ids) == 30
    read = model.tokenizer.encode("x") + stream.ids
    logits, state = model.prefill(torch.tensor([read]))
    assert torch.allclose(stream.logits, logits[0], rtol=0, atol=1e-12)
    assert torch.allclose(stream.state.wkv, state.wkv, rtol=0, atol=1e-12)
    # It continues from there as if it had not ended.
    greedy = generate_stream(model, "x", 10, temperature=0)
    list(greedy)
    further = generate(model, "", 10, temperature=0, state=greedy.state, logits=greedy.logits)[0]
    assert greedy.text + further == generate(model, "x", 20, temperature=0)[0]

    stream = generate_stream(model, "x", 30, seed=3, top_p=1.0, stop_tokens=[pairs[5][0]])
    assert list(stream)[-1][0] == pairs[5][0] and stream.reason == "stop token"
    stop = "".join(text for _, text in pairs)[10:12]
    stream = generate_stream(model, "x", 30, seed=3, top_p=1.0, stop=stop)
    assert stream.reason == "" and list(stream) and stream.reason == "stop" and stop not in stream.text
    none = generate_stream(model, "x", 0)
    assert list(none) == [] and none.reason == "max_new_tokens" and none.state.batch_size == 1
    model.ln_out.weight.data.zero_()
    model.ln_out.bias.data.fill_(1.0)
    model.head.weight.data[0] = 100.0
    stream = generate_stream(model, "x")
    assert list(stream) == [(0, "")] and stream.reason == "end of text"


def test_a_callback_ends_it_by_returning_false():
    model, seen = make_model(), []

    def callback(token, text):
        seen.append(text)
        return len(seen) < 5

    text = model.generate_with_streaming("x", 30, streaming_callback=callback)
    assert len(seen) == 5 and text == "".join(seen)
    assert len(model.generate_with_streaming("x", 30, streaming_callback=lambda t, s: 0)) > len(text)  # only False
    seen.clear()
    assert model.generate_with_streaming("x", 30, streaming_callback=lambda *a: np.bool_(callback(*a))) == text
    stream = generate_stream(model, "x", 30)
    next(stream)
    stream.stop()
    assert stream.reason == "stopped" and list(stream) == [] and len(stream.ids) == 1


def test_prompts_are_texts_or_ids():
    model = make_model()
    ids = model.tokenizer.encode("abc")
    text = generate(model, ["abc"], 10)
    for prompt in (bytearray(b"abc"), memoryview(b"abc")):  # bytes of a text, not ids
        assert generate(model, prompt, 10) == text == [model.generate_with_streaming(prompt, 10)]
    for prompt in ("abc", b"abc", ids, torch.tensor(ids), torch.tensor([ids]), [ids], (i for i in ids), [b"abc"]):
        assert generate(model, prompt, 10) == text
    assert len(generate(model, torch.tensor([ids, ids]), 1)) == 2
    for prompt in ("abc", b"abc", ids, tuple(ids), torch.tensor(ids)):
        assert model.generate_with_streaming(prompt, 10) == text[0]


def test_what_makes_no_sense_is_refused():
    model = make_model()
    logits, state = model.prefill(torch.tensor([[5, 6]]))
    for message, prompt, wrong in (
        ("nothing to read after the state", "", {"state": state}),
        ("nothing to read after the state", [], {"state": state}),
        ("pass state=", "", {"logits": logits[0]}),
        ("and an empty prompt", "x", {"state": state, "logits": logits[0]}),
        (r"logits have shape \[3\]", "", {"state": state, "logits": torch.zeros(3)}),
        ("each must be a text", "x", {"stop": [""]}),
        ("it holds 5; each must be a text", "x", {"stop": [5]}),
        ("stop holds 5", "x", {"stop": iter([5])}),
        ("stop=7", "x", {"stop": 7}),
        ("stop_tokens='ab'", "x", {"stop_tokens": "ab"}),
        ("stop_tokens holds 257", "x", {"stop_tokens": [257]}),
        ("exempt_tokens holds -1", "x", {"exempt_tokens": [-1]}),
        ("Token 257 is outside", [1, 257], {}),
        ("each must be a whole number", [1.5], {}),
        ("whole numbers", iter([1.5]), {}),
        ("prompt=None", None, {}),
        ("prompt=.*it must be a text or a list", {5, 6}, {}),  # the order of a set is no order
        ("meta device", "", {"state": state, "logits": logits[0].to("meta")}),
        ("seed='x'", "x", {"seed": "x"}),
        ("presence_penalty=nan", "x", {"presence_penalty": float("nan")}),
        ("penalty_decay=1.5", "x", {"penalty_decay": 1.5}),
        ("max_new_tokens=True", "x", {"max_new_tokens": True}),
        ("sampling='hf'.*'standard', 'rwkv'", "x", {"sampling": "hf"}),
        ("cache=5", "x", {"cache": 5}),
    ):
        with pytest.raises(ParameterError, match=message):
            model.generate_with_streaming(prompt, **wrong)
    with pytest.raises(ParameterError, match="at least one prompt"):
        generate(model, [])
    assert (
        generate(model, ["", ""], 5, state=state, logits=logits)[0]
        == generate(model, "", 5, state=state, logits=logits[0])[0]
    )
    assert StateCache(10**6).nbytes == 0


@pytest.mark.parametrize("stop", [[None], iter([None]), ["a", None], [b"a"]])
def test_a_list_that_holds_something_else_is_refused(stop):
    with pytest.raises(ParameterError, match="stop"):
        stop_texts(stop)


@pytest.mark.parametrize("callback", [lambda: None, lambda token: None, lambda token, text, more: None])
def test_a_callback_that_cannot_be_called_is_refused_before_anything_is_read(callback):
    with pytest.raises(ParameterError, match="called with .token, text.; this one cannot be"):
        make_model().generate_with_streaming("a", max_new_tokens=1, streaming_callback=callback)


def test_one_stop_token_of_any_whole_type():
    model = make_model()
    token = generate_stream(model, "x", 30)
    ids = [next(token)[0] for _ in range(5)]
    for stop_token in (ids[-1], np.int64(ids[-1]), torch.tensor(ids[-1]), np.array([ids[-1]])):
        stream = generate_stream(model, "x", 30, stop_tokens=stop_token)
        list(stream)
        assert (stream.ids, stream.reason) == (ids[: ids.index(ids[-1]) + 1], "stop token")
