"""Which token is drawn: the order of both conventions, penalties, and seeds."""

import inspect

import numpy as np
import pytest
import torch
from random_rwkv7 import make_model

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import ByteTokenizer, RWKV_Dual, generate, generate_stream, row_seed
from rwkv_lab.model.sampling import Sampling, candidates, sample

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.0, 1.0])
CASES = [
    {"temperature": t, "top_p": p, "top_k": k}
    for t in (0.0, 0.5, 1.0, 2.0)
    for p in (0.0, 0.3, 0.75, 0.8, 1.0)
    for k in (0, 1, 2, 3, 6, 99)
]


def in_its_order(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities as PyPI rwkv has them, from its description: top_p, top_k, temperature."""
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    limit = p[order][np.argmax(np.cumsum(p[order]) >= top_p - 1e-12)]
    p = np.where(p >= limit, p, 0)
    if 0 < top_k < len(p):
        p[order[top_k:]] = 0
    p = p ** (1 / temperature)
    return p / p.sum()


def probabilities(logits: torch.Tensor, **how) -> np.ndarray:
    tokens, weights = candidates(logits, Sampling(**how))
    found = np.zeros(len(logits))
    found[tokens] = weights / weights.sum()
    return found


def drawn(logits, n: int, **how) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {sample(logits, Sampling(**how), generator) for _ in range(n)}


@pytest.mark.parametrize("how", CASES)
def test_the_order_of_the_rwkv_package(how):
    found, expected = probabilities(LOGITS, sampling="rwkv", **how), in_its_order(LOGITS.double().numpy(), **how)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_rwkv_package_itself_draws_from_the_same(monkeypatch):
    utils = pytest.importorskip("rwkv.utils", reason="the PyPI package rwkv is not installed")
    pipeline, theirs = utils.PIPELINE.__new__(utils.PIPELINE), []
    monkeypatch.setattr(np.random, "choice", lambda a, p: theirs.append(p) or 0)
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.25, 1.0])  # without ties: which of two its top_k keeps is not stated
    for how in CASES:
        pipeline.sample_logits(logits.clone(), **how)
        if how["top_p"] < 1.0:  # its float32 sum may stay below 1, and then it keeps only the likeliest
            found = probabilities(logits, sampling="rwkv", **how)
            np.testing.assert_allclose(found, theirs[-1], rtol=1e-5, atol=1e-7, err_msg=str(how))


def test_the_two_orders_differ():
    # At temperature 2 the likeliest has 0.32: top_p 0.4 needs a second one. At temperature 1 it has 0.48.
    assert drawn(LOGITS, 300, temperature=2.0, top_p=0.4) > {1}
    assert drawn(LOGITS, 300, temperature=2.0, top_p=0.4, sampling="rwkv") == {1}


def test_top_p_0_is_for_one_convention_only():
    with pytest.raises(ParameterError, match="top_p=0.0 leaves no token.*\n.*temperature=0"):
        Sampling(top_p=0.0)
    assert drawn(torch.tensor([1.0, 1.0, 0.0]), 99, top_p=0.0, sampling="rwkv") == {0, 1}


def counts_after(tokens: list[int], **how) -> dict[int, float]:
    counts, sampling = {}, Sampling(**how)
    for token in tokens:
        sampling.count(counts, token, ByteTokenizer(257))
    return counts


def test_penalties_decay_and_spare():
    a, digit = 98, ByteTokenizer(257).encode("7")[0]
    assert counts_after([a, a, digit]) == {a: 2, digit: 1}
    assert counts_after([a, digit, a, digit], penalty_decay=0.5) == {a: 0.625, digit: 1.25}
    assert counts_after([a, a, digit], exempt_tokens=[a]) == {digit: 1}
    assert counts_after([a, digit, digit], sampling="rwkv") == {a: 1, digit: 0}
    assert counts_after([a, a], sampling="rwkv", exempt_tokens={a}) == {a: 0}
    with_zero = [sample(LOGITS, Sampling(temperature=0, presence_penalty=1.5), torch.Generator(), {1: 0})]
    assert with_zero == [2]


def test_an_exempt_token_is_written_again_and_again():
    model = make_model(seed=3)
    best = generate_stream(model, "x", 1, temperature=0)
    token = next(best)[0]
    model.head.weight.data[token] += model.head.weight.data.abs().sum()
    how = {"temperature": 0, "presence_penalty": 1e6}
    free = generate_stream(model, "x", 20, exempt_tokens=iter(range(257)), **how)
    bound = generate_stream(model, "x", 20, **how)
    assert list(free) and list(bound) and len(set(bound.ids)) == len(bound.ids) and free.ids != bound.ids


def test_seeds_of_neighbouring_rows_are_independent():
    model = make_model()
    texts = [generate(model, ["x"] * 4, 20, seed=seed, top_p=1.0) for seed in range(4)]
    assert len({text for batch in texts for text in batch}) == 16
    assert row_seed(5, 0) == 5 and len({row_seed(seed, row) for seed in range(50) for row in range(50)}) == 2500
    assert generate(model, ["x"] * 4, 20, seed=2, top_p=1.0) == texts[2]
    assert generate(model, ["x"], 20, seed=row_seed(2, 3), top_p=1.0) == texts[2][3:]


def test_no_seed_draws_anew():
    model = make_model()
    assert len({generate(model, "x", 30, seed=None, top_p=1.0)[0] for _ in range(3)}) == 3


def test_every_way_to_generate_takes_the_same_options():
    def options(function):
        return {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }

    stream = options(generate_stream)
    assert options(generate) == stream
    assert options(RWKV_Dual.generate_with_streaming) == stream | {"streaming_callback": None}
    sampling = options(Sampling)
    assert {name: stream[name] for name in sampling} == sampling


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-1e39, 1e39])
def test_penalties_beyond_float32_are_refused(name, value):
    with pytest.raises(ParameterError, match=f"{name}=.*overflow float32"):
        sample(torch.zeros(5), Sampling(**{name: value}), torch.Generator(), {2: 1})
