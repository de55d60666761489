"""Text in, text out: bytes as tokens, whole characters only, sampling, and bits per byte."""

import math
from collections import Counter

import pytest
import torch
from random_rwkv7 import add_random_time_state, make_model, make_tokens

from rwkv_lab.errors import NumericsError, ParameterError
from rwkv_lab.model import ByteTokenizer, RWKVMode, bits_per_byte
from rwkv_lab.model.sampling import Sampling, sample

TEXT = "naïve 日本語 👩‍🔬\n"


@pytest.mark.parametrize("vocab_size, first", [(256, 97), (257, 98)])
def test_bytes_are_tokens(vocab_size, first):
    tokenizer = ByteTokenizer(vocab_size)
    assert tokenizer.encode("a") == [first]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(b"\xff") == [255 + vocab_size - 256]
    with pytest.raises(ParameterError, match=f"Token {vocab_size}"):
        tokenizer.decode([vocab_size])


def test_token_0_ends_the_text_and_is_no_byte():
    assert ByteTokenizer(257).decode([98, 0, 99]) == "ab"
    assert ByteTokenizer(256).end_of_text is None
    with pytest.raises(ParameterError, match="65536"):
        ByteTokenizer(65536)


def test_a_stream_never_splits_a_character():
    tokenizer = ByteTokenizer(257)
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert all(len(piece) <= 1 and "\ufffd" not in piece for piece in pieces)
    cut = tokenizer.stream()
    assert cut.feed(tokenizer.encode("é")[0]) == ""
    assert cut.close() == "\ufffd"


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    draw = lambda t, p, seed: sample(logits, Sampling(t, p), torch.Generator().manual_seed(seed), Counter())  # noqa: E731
    assert {draw(0, 1.0, s) for s in range(9)} == {1}
    assert {draw(1.0, 1e-9, s) for s in range(9)} == {1}
    assert {draw(5.0, 1.0, s) for s in range(99)} == {0, 1, 2, 3}
    assert {draw(1.0, 0.9, s) for s in range(99)} == {1, 2}  # 0.70 + 0.26 is the first sum above 0.9
    with pytest.raises(NumericsError):
        sample(torch.tensor([0.0, float("nan")]), Sampling(), torch.Generator(), Counter())


@pytest.mark.parametrize("mode", list(RWKVMode))
def test_generation_goes_on_where_the_prompt_ends(mode):
    model = make_model(dtype=torch.float64)
    model.set_mode(mode)
    seen = []
    text = model.generate_with_streaming(
        prompt="Hello",
        max_new_tokens=30,
        temperature=0,
        streaming_callback=lambda token, piece: seen.append((token, piece)),
    )
    assert text == "".join(piece for _, piece in seen)
    # The slow twin: the whole text through the model again for every new token.
    ids = model.tokenizer.encode("Hello")
    for token, _ in seen:
        assert int(model(torch.tensor([ids]))[0][0, -1].argmax()) == token
        ids.append(token)


def test_generation_repeats_by_seed_and_takes_a_state():
    model = make_model()
    write = lambda **k: model.generate_with_streaming("x", max_new_tokens=40, **k)  # noqa: E731
    assert write(seed=1) == write(seed=1) != write(seed=2)
    _, state = model(torch.tensor([model.tokenizer.encode("ab")]))
    copy = state.clone()
    assert write(state=state) == model.generate_with_streaming("abx", max_new_tokens=40)
    assert torch.equal(state.wkv, copy.wkv)
    assert model.generate_with_streaming("", max_new_tokens=0) == ""
    assert make_model(vocab_size=256).batch_decode([[72, 105], [33]]) == ["Hi", "!"]


def test_generation_stops_at_the_end_of_text():
    model = make_model()
    model.ln_out.weight.zero_()
    model.ln_out.bias.fill_(1.0)
    model.head.weight[0] = 100.0
    assert model.generate_with_streaming("x", max_new_tokens=5) == ""


def test_generation_refuses_what_makes_no_sense():
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": -1}):
        with pytest.raises(ParameterError, match="Sampling: |generate_stream: max_new_tokens=-1"):
            make_model().generate_with_streaming("x", **wrong)
    with pytest.raises(ParameterError, match="empty"):
        make_model(vocab_size=256).generate_with_streaming("")


@pytest.mark.parametrize("n_bytes, ctx_len", [(2, 5), (64, 63), (65, 64), (100, 7), (100, 1)])
def test_bits_per_byte_counts_every_byte_but_the_first_once(n_bytes, ctx_len):
    model = make_model(vocab_size=256, dtype=torch.float64)
    add_random_time_state(model)
    data = bytes(make_tokens(1, n_bytes, 256)[0].tolist())
    bits = 0.0
    for start in range(0, n_bytes - 1, ctx_len):
        window = torch.tensor([list(data[start : start + ctx_len + 1])])
        logits, _ = model(window[:, :-1])
        bits -= logits[0].log_softmax(-1).gather(1, window[0, 1:, None]).sum().item() / math.log(2)
    # float32 inside the loss; about seven digits.
    assert bits_per_byte(model, data, ctx_len) == pytest.approx(bits / (n_bytes - 1), rel=1e-5)


def test_bits_per_byte_starts_every_window_from_the_state():
    model, data = make_model(), bytes(range(100))
    _, state = model(torch.tensor([[5, 6, 7]]))
    plain = bits_per_byte(model, data, 10)
    assert bits_per_byte(model, data, 10, state=state) != plain
    assert bits_per_byte(model, data, 10, state=model.create_state()) == plain
    with pytest.raises(ParameterError):
        bits_per_byte(model, b"a", 10)


def test_bits_per_byte_shares_the_bits_of_a_token_out_over_its_bytes():
    model, text = make_model(vocab_size=65536), " Hello there, naïve 日本".encode()
    ids = model.tokenizer.encode(text)
    logits, _ = model(torch.tensor([ids[:-1]]))
    bits = -logits[0].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item() / math.log(2)
    assert bits_per_byte(model, text, 100) == pytest.approx(bits / len(text[len(" Hello") :]), rel=1e-5)
