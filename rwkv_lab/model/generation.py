"""From a prompt to text: one parallel pass over the prompt, then token by token."""

from collections.abc import Callable

import torch

from rwkv_lab.errors import NumericsError, ParameterError


def sample(logits, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token from logits `[V]`: the likeliest at temperature 0, else from the smallest set that holds `top_p`.

    Raises:
        NumericsError: the logits hold NaN or infinity.
    """
    logits = logits.float().cpu()  # a generator on the CPU gives the same draws for every device
    if not logits.isfinite().all():
        raise NumericsError("The model's logits hold NaN or infinity: its weights or its dtype are at fault.")
    if temperature == 0:
        return int(logits.argmax())
    probs, tokens = torch.softmax(logits / temperature, -1).sort(descending=True, stable=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # keeps at least the likeliest
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


@torch.no_grad()
def generate(
    model,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    state,
    streaming_callback: Callable[[int, str], None] | None,
) -> str:
    """The text that follows the prompt; arguments as in `RWKV_Dual.generate_with_streaming`."""
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ParameterError(
            f"Sampling needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 0; "
            f"given: {temperature}, {top_p}, {max_new_tokens}."
        )
    tokenizer = model.tokenizer
    ids = tokenizer.encode(prompt)
    if not ids:
        if tokenizer.end_of_text is None:
            raise ParameterError("The prompt is empty, and this vocabulary has no token to begin a text with.")
        ids = [tokenizer.end_of_text]

    generator = torch.Generator().manual_seed(seed)
    stream, pieces = tokenizer.stream(), []
    logits, state = model.prefill(torch.tensor([ids]), state)
    for left in range(max_new_tokens - 1, -1, -1):
        token = sample(logits[0], temperature, top_p, generator)
        last = left == 0 or token == tokenizer.end_of_text
        pieces.append(stream.feed(token, last=last))
        if streaming_callback is not None:
            streaming_callback(token, pieces[-1])
        if last:
            break
        logits, state = model.prefill(torch.tensor([[token]]), state)
    return "".join(pieces)
