"""Models with random weights in which no part is idle: fresh ones start with zeros in many places."""

import torch

from rwkv_lab.model import RWKV_Dual


def make_model(n_embd=64, n_layer=2, vocab_size=257, head_size=32, seed=0, dtype=torch.float32) -> RWKV_Dual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RWKV_Dual(n_embd, n_layer, vocab_size, ctx_len=40, head_size=head_size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 3 else parameter.shape[-1] ** -0.5)
    return model.to(dtype).requires_grad_(False)


def add_random_time_state(model: RWKV_Dual, seed=0) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.add_time_state()
    for block in model.blocks:
        block.att.time_state.data = torch.randn(block.att.time_state.shape, generator=generator).to(model.state_dtype)


def make_tokens(B, T, vocab_size=257, seed=0) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def relative_rms(found, expected) -> float:
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    return float(((found - expected).square().mean() / expected.square().mean()).sqrt())
