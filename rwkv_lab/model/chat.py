"""The answer that a model gives to a conversation, by a chat template."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Annotated, Any

from annotated_types import Ge

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError
from rwkv_lab.model.chat_template import ChatTemplate, chat_template, render_turns
from rwkv_lab.model.generation import check_callback, generate_stream, read_to_end
from rwkv_lab.model.protocol import Model
from rwkv_lab.suggestions import unknown_name


@checked
def chat(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    template: str | ChatTemplate = "world",
    max_new_tokens: Annotated[int, Ge(0)] = 500,
    streaming_callback: Callable[[int, str], object] | None = None,
    *,
    think: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    ignore: Iterable[str] = (),
    stop: str | Iterable[str] | None = None,
    **options: Any,
) -> str:
    """The model's answer to the last message, up to the end of its turn.

    Append it as `{"role": "assistant", "content": answer}` to go on, best with one `cache=StateCache(…)` for all calls.

    Args:
        messages, template, tools, ignore: as in `render_turns`; the last message is not the assistant's.
        streaming_callback: called with every new token and the text that it completes; it ends the answer by returning
            False.
        think: True lets a World model that was trained to do so think first, and the answer holds the thoughts; False
            asks it not to. None for models that do not know this, such as those that were trained here.
        stop: texts that end the answer; None for the end of a turn: a blank line in the World template, or, with
            `think`, a blank line that a user's turn follows, since thoughts hold blank lines.
        options: more of `generate_stream`: temperature, top_p, seed, cache, ….

    Raises:
        ParameterError: no conversation, or one that ends with the assistant's turn; as `generate_stream`.
    """
    check_callback(streaming_callback)
    template = chat_template(template)
    turns = render_turns(messages, template, tools, ignore)
    if not turns:
        raise ParameterError("There is nothing to answer: no message has text.")
    if turns[-1].role == "assistant":
        raise ParameterError("The last message is the assistant's; the model answers a user's or a tool's.")
    if stop is None:
        stop = template.assistant_end if think is None else template.assistant_end + template.user_start
    allowed = {*signature(generate_stream).parameters} - {"model", "prompt"}
    for name in options:
        if name not in allowed:
            raise unknown_name("chat", name, sorted(allowed))
    begin = {None: "", True: "<think", False: "<think></think"}[think]
    prompt = "".join(turn.text for turn in turns) + template.assistant_start + (begin and " " + begin)
    text = read_to_end(generate_stream(model, prompt, max_new_tokens, stop=stop, **options), streaming_callback)
    answer = text if think is None else (begin + text).removeprefix("<think></think>")
    return answer.strip()
