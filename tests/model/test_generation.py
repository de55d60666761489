"""Choosing tokens, and several texts at once."""

from collections import Counter

import pytest
import torch
from random_rwkv7 import add_random_time_state, make_model

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKVMode, StateCache, generate, row_seed
from rwkv_lab.model.prompts import read_prompts
from rwkv_lab.model.sampling import Sampling, sample

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0])
PROMPTS = ["a", "The second prompt is longer than ctx_len, which is forty tokens.", "日本", "a"]


def drawn(counts=(), **sampling) -> set[int]:
    generators = (torch.Generator().manual_seed(seed) for seed in range(200))
    return {sample(LOGITS, Sampling(**sampling), g, Counter(counts)) for g in generators}


def test_top_k_and_temperature():
    assert drawn(top_p=1.0, temperature=3.0) == {0, 1, 2, 3}
    assert drawn(top_p=1.0, temperature=1e-300) == {1}
    assert drawn(top_p=1.0, temperature=3.0, top_k=3) == {0, 1, 2}
    assert drawn(top_p=1.0, temperature=3.0, top_k=1) == {1}
    assert drawn(top_p=1.0, temperature=3.0, top_k=99) == {0, 1, 2, 3}
    # Of the two that top_k leaves, the first has 0.73: with top_p 0.72 it is alone, which it is not among all four.
    assert drawn(top_p=0.72, top_k=2) == {1} and drawn(top_p=0.72) == {1, 2}


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    found = Counter(sample(LOGITS, Sampling(2.0, 1.0), generator, Counter()) for _ in range(4000))
    for token, p in enumerate((LOGITS / 2).softmax(-1).tolist()):
        assert abs(found[token] / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5  # four standard deviations


def test_penalties_are_for_what_was_generated_before():
    greedy = {"temperature": 0.0}
    assert drawn(**greedy) == {1}
    assert drawn([1], presence_penalty=1.5, **greedy) == {2}
    assert drawn([1, 1, 1], presence_penalty=0.9, **greedy) == {1}
    assert drawn([1, 1, 1], frequency_penalty=0.4, **greedy) == {2}
    assert drawn([1], frequency_penalty=0.4, **greedy) == {1}
    assert LOGITS.tolist() == [0, 3, 2, -1]
    model = make_model(seed=3)
    plain = [ids for ids in tokens_of(model, temperature=0, max_new_tokens=200)]
    shy = [ids for ids in tokens_of(model, temperature=0, max_new_tokens=200, presence_penalty=1e6)]
    assert len(set(plain)) < 200 and len(set(shy)) == len(shy)


def tokens_of(model, prompt="x", **how) -> list[int]:
    tokens = []
    model.generate_with_streaming(prompt, streaming_callback=lambda token, text: tokens.append(token), **how)
    return tokens


@pytest.mark.parametrize("mode", list(RWKVMode))
@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.2, "top_p": 0.95, "frequency_penalty": 0.3}])
def test_each_prompt_of_a_batch_is_continued_as_if_alone(how, mode):
    model = make_model(dtype=torch.float64)
    add_random_time_state(model)
    model.set_mode(mode)
    together = generate(model, PROMPTS, max_new_tokens=40, seed=5, **how)
    alone = [
        model.generate_with_streaming(p, max_new_tokens=40, seed=row_seed(5, row), **how)
        for row, p in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len(set(together)) == (3 if how["temperature"] == 0 else 4)


def test_rows_of_a_batch_stop_on_their_own():
    model = make_model(dtype=torch.float64)
    full = [tokens_of(model, p, seed=row_seed(0, row), max_new_tokens=30) for row, p in enumerate(PROMPTS)]
    stop = full[0][10]
    together = generate(model, PROMPTS, max_new_tokens=30, stop_tokens=[stop])
    decode = model.tokenizer.decode
    assert together == [decode(t[: t.index(stop)] if stop in t else t) for t in full]
    assert len({len(t) for t in together}) > 1


def test_stop_tokens_are_no_part_of_the_text():
    model = make_model()
    tokens = tokens_of(model, max_new_tokens=30)
    at = tokens.index(tokens[20])
    seen = []
    text = model.generate_with_streaming(
        "x", 30, stop_tokens={tokens[20]}, streaming_callback=lambda *s: seen.append(s)
    )
    assert [token for token, _ in seen] == tokens[: at + 1]
    assert text == model.tokenizer.decode(tokens[:at]) == "".join(piece for _, piece in seen)
    with pytest.raises(ParameterError, match="257"):
        model.generate_with_streaming("x", stop_tokens=[257])


def test_states_for_a_batch():
    model = make_model(dtype=torch.float64)
    _, states = read_prompts(model, [[5, 6], [7]])
    together = generate(model, ["x", "y"], 20, state=states)
    assert together == [
        model.generate_with_streaming(p, 20, seed=row_seed(0, i), state=states.rows([i]))
        for i, p in enumerate(["x", "y"])
    ]
    assert generate(model, ["x", "y"], 20, state=states.rows([1]))[1] == together[1]
    with pytest.raises(ParameterError, match="2 sequences.*3"):
        generate(model, ["x", "y", "z"], 20, state=states)


def test_reading_ragged_prompts_leaves_every_row_as_if_it_were_alone():
    model = make_model(dtype=torch.float64)
    prompts = [[1] * 3, list(range(90)), [9], list(range(90)), [4, 5]]
    logits, state = read_prompts(model, prompts)
    for row, prompt in enumerate(prompts):
        alone, final = model.prefill(torch.tensor([prompt]))
        assert torch.allclose(logits[row], alone[0], rtol=0, atol=1e-12)
        for name, part in state.rows([row]).tensors().items():
            assert torch.allclose(part, getattr(final, name), rtol=0, atol=1e-12)


def test_a_cache_saves_reading_and_changes_nothing(monkeypatch):
    model, cache = make_model(dtype=torch.float64), StateCache(10**8)
    expected = generate(model, PROMPTS, 20)
    assert generate(model, PROMPTS, 20, cache=cache) == expected
    read = []
    right = type(model).prefill
    monkeypatch.setattr(type(model), "prefill", lambda self, t, s: read.append(t.numel()) or right(self, t, s))
    assert generate(model, PROMPTS, 1, cache=cache) and read == []  # no prompt was read again
    # A conversation goes on: the text so far is known up to the last token drawn.
    talk = model.tokenizer.encode(PROMPTS[0]) + tokens_of(model, PROMPTS[0], max_new_tokens=20)
    read.clear()
    logits, _ = read_prompts(model, [[*talk, 34]], cache=cache)
    assert read == [2]
    assert torch.allclose(logits, right(model, torch.tensor([[*talk, 34]]))[0], rtol=0, atol=1e-12)


def test_refusals():
    model = make_model()
    for wrong in ({"top_k": -1}, {"temperature": float("nan")}):
        with pytest.raises(ParameterError, match="top_k=-1|temperature=nan"):
            model.generate_with_streaming("x", **wrong)
    with pytest.raises(ParameterError, match="at least one"):
        generate(model, [])
    with pytest.raises(ParameterError, match="empty"):
        generate(make_model(vocab_size=256), ["x", ""])
    with pytest.raises(ParameterError, match="cannot be combined"):
        model.generate_with_streaming("x", state=model.create_state(), cache=StateCache(10**6))
