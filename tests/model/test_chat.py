"""Conversations as the World models read them, or by a template that is given."""

import pytest
from random_rwkv7 import make_model

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import ChatTemplate, StateCache, Turn, chat, render_turns

TALK = [
    {"role": "system", "content": "Be brief.\n\n"},
    {"role": "user", "content": " Hello,\n\n \n\nyou "},
    {"role": "assistant", "content": "Hi.\r\n\r\nWhat is it?"},
    {"role": "user", "content": "1 + 1"},
]


def text_of(messages, *args, **kwargs) -> str:
    return "".join(turn.text for turn in render_turns(messages, *args, **kwargs))


def test_the_world_template():
    assert render_turns(TALK) == [
        Turn("System: Be brief.\n\n", "system", False),
        Turn("User: Hello,\nyou\n\n", "user", False),
        Turn("Assistant:", "assistant", False),
        Turn(" Hi.\nWhat is it?\n\n", "assistant", True),
        Turn("User: 1 + 1\n\n", "user", False),
    ]


def test_tools_and_their_answers():
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    talk = [
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2\n\n", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 2."},
    ]
    assert text_of(talk, tools=[{"name": "add"}]) == (
        'System: Tools:\n[{"name": "add"}]\n\nUser: 1 + 1\n\n'
        'Assistant: ```json\n{"name": "add", "arguments": {"a": 1}}\n```\n\n'
        "User: Function output:\n2\n\nAssistant: It is 2.\n\n"
    )
    assert text_of([{"role": "system", "content": "S"}, talk[0]], tools=[{}]).startswith("System: S\nTools:\n[{}]\n\nU")


def test_names_of_roles_and_fields_in_use():
    sharegpt = [
        {"from": "system", "value": ""},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "function", "value": "c"},
    ]
    assert text_of(sharegpt) == "User: a\n\nAssistant: b\n\nUser: Function output:\nc\n\n"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text_of([{"role": "User", "content": parts, "refusal": None}]) == "User: ab\n\n"


def test_a_template_that_is_given():
    template = ChatTemplate(
        **{role: f"<|{role}|>\n{{text}}<|end|>\n" for role in ("system", "user", "assistant", "tool")},
        collapse_blank_lines=False,
    )
    turns = render_turns([{"role": "user", "content": "a\n\nb{text}"}, {"role": "assistant", "content": "c"}], template)
    assert [turn.text for turn in turns] == ["<|user|>\na\n\nb{text}<|end|>\n", "<|assistant|>\n", "c<|end|>\n"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "messages=.*must be a list"),
        ({"role": "user", "content": "x"}, "messages=.*must be a list"),
        (None, "messages=None: it must be a list"),
        ([], "messages is empty"),
        (["Hello"], "each must be a dict"),
        ([TALK[0], {"content": "x"}], "message 2 has no role"),
        ([{"role": "usr", "content": "x"}], "'usr'.*did you mean user"),
        ([{"role": "user", "content": ""}], "no text"),
        ([{"role": "assistant", "content": " \n"}], "no text"),
        ([{"role": "user", "content": "x", "value": "y"}], "both content and value"),
        ([{"role": "user", "content": "x", "image": "y.png"}], r"'image'.*\n.*ignore=\['image'\]"),
        ([{"role": "assistant", "content": "x", "reasoning_content": "y"}], "'reasoning_content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part 1 of its content is no text, but 'image_url'"),
        ([{"role": "user", "content": [{"type": "reasoning", "text": "x"}]}], "is no text, but 'reasoning'"),
        ([{"role": "user", "content": [{"text": "x", "image": "y"}]}], r"part 1 .*'image'.*\n.*ignore=\['image'\]"),
        ([{"role": "user", "content": [7]}], "part 1 of its content must be a text; it is int"),
        ([{"role": "user", "from": "gpt", "content": "x"}], "the roles 'user' and 'gpt'"),
        ([{"role": "user", "content": 7}], "content must be a text or a list of parts; it is int"),
        ([{"role": "assistant", "tool_calls": [{"arguments": 1}]}], "tool call needs"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments of f are no JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {1j: 2}}]}], "cannot be written as JSON"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ParameterError, match=message):
        render_turns(messages)


def test_wrong_templates_are_refused():
    with pytest.raises(ParameterError, match="'word'.*did you mean world"):
        render_turns(TALK, "word")
    with pytest.raises(ParameterError, match="user='User:'"):
        ChatTemplate(user="User:")
    with pytest.raises(ParameterError, match="behind"):
        ChatTemplate(assistant="A: {text}")
    assert text_of([{"role": "user", "content": "x", "image": "y.png"}], ignore=["image"]) == "User: x\n\n"


def scripted(answer: str):
    """A model of byte tokens that answers to anything with this text, by logits that follow the last token."""
    model = make_model(n_layer=1)
    right = type(model).prefill
    ids = model.tokenizer.encode(answer)
    given: list[str] = []

    def prefill(tokens, state=None, lengths=None):
        if tokens.shape[1] > 1:
            given.append(model.tokenizer.decode(tokens[0].tolist()))
            prefill.left = list(ids)
        logits, after = right(model, tokens, state, lengths)
        logits[:] = 0.0
        logits[:, prefill.left.pop(0) if prefill.left else 0] = 100.0
        return logits, after

    model.prefill = prefill
    model.ctx_len = 10_000
    return model, given


def test_an_answer_ends_with_its_turn():
    model, given = scripted(" I am\na model.\n\nUser: and")
    shown = []
    answer = chat(model, [{"role": "user", "content": "Who?"}], streaming_callback=lambda *x: shown.append(x))
    assert answer == "I am\na model."
    assert given == ["User: Who?\n\nAssistant:"]
    assert "".join(text for _, text in shown) == " I am\na model."
    assert chat(model, TALK, stop="model", seed=3, cache=StateCache(10**8)) == "I am\na"
    assert chat(model, TALK, max_new_tokens=3) == "I"


def test_thinking():
    model, given = scripted("> Hm.\n\nSo: </think>Yes.\n\nUser: and")
    question = [{"role": "user", "content": "Is it?"}]
    assert chat(model, question, think=True) == "<think> Hm.\n\nSo: </think>Yes."
    assert given == ["User: Is it?\n\nAssistant: <think"]
    model, given = scripted("> No.\n\nUser: and")
    assert chat(model, question, think=False) == "No."
    assert given == ["User: Is it?\n\nAssistant: <think></think"]


def test_what_can_not_be_answered_is_refused():
    model = make_model(n_layer=1)
    with pytest.raises(ParameterError, match="last message is the assistant's"):
        chat(model, TALK[:3])
    with pytest.raises(ParameterError, match="'temprature'.*did you mean temperature"):
        chat(model, TALK, temprature=1.0)
    with pytest.raises(ParameterError, match="chat: model=5"):
        chat(5, TALK)
    assert chat(model, TALK, max_new_tokens=0) == ""


def test_what_cannot_be_answered_says_why():
    model = make_model()
    with pytest.raises(ParameterError, match="nothing to answer: no message has text"):
        chat(model, [{"role": "system", "content": ""}])
    with pytest.raises(ParameterError, match="called with .token, text.; this one cannot be"):
        chat(model, TALK[:1], streaming_callback=lambda token: None)
    with pytest.raises(ParameterError, match="collapse_blank_lines='no'"):
        ChatTemplate(collapse_blank_lines="no")  # pyright: ignore[reportArgumentType]
