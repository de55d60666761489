"""Conversations as the World models read them, or by a template that is given."""

import pytest

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import ChatTemplate, Turn, render_turns

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
        ("Hello", "messages is a str"),
        ({"role": "user", "content": "x"}, "messages is a dict"),
        (None, "messages is a NoneType"),
        ([], "messages is empty"),
        (["Hello"], "message 1 is a str"),
        ([TALK[0], {"content": "x"}], "message 2 has no role"),
        ([{"role": "usr", "content": "x"}], "'usr'.*did you mean user"),
        ([{"role": "user", "content": ""}], "no text"),
        ([{"role": "assistant", "content": " \n"}], "no text"),
        ([{"role": "user", "content": "x", "value": "y"}], "both content and value"),
        ([{"role": "user", "content": "x", "image": "y.png"}], r"'image'.*\n.*ignore=\['image'\]"),
        ([{"role": "assistant", "content": "x", "reasoning_content": "y"}], "'reasoning_content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts that are no text"),
        ([{"role": "user", "content": 7}], "content is a int"),
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
