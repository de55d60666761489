"""Records as examples: names in use, conversations, fields that are not used; and folders of data files."""

import json

import numpy as np
import pytest
from tiny_training import SHORT

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import Corpus, Examples, TokenCorpus, load_corpus, plan_training, train
from rwkv_lab.train.batches import SKIP, in_batches


def jsonl(path, *records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def examples(path, *records, **options):
    found = load_corpus(jsonl(path / "x", *records), **options)
    assert isinstance(found, Examples)
    return sorted((*found.train, *found.held_out), key=lambda e: e.line), found.notes


OTHER = {"text": "another"}


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"text": "a"}, "", "a"),
        ({"prompt": "a ", "response": "b"}, "a ", "b"),
        ({"prompt": "a ", "completion": "b"}, "a ", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "User: a\n\nAssistant:", " b\n\n"),
        ({"instruction": "a", "input": "c", "output": "b"}, "User: a\nc\n\nAssistant:", " b\n\n"),
        ({"instruction": "a", "context": "c", "response": "b"}, "User: a\nc\n\nAssistant:", " b\n\n"),
        ({"question": "a", "answer": "b"}, "User: a\n\nAssistant:", " b\n\n"),
        ({"query": "a", "response": "b"}, "User: a\n\nAssistant:", " b\n\n"),
        ({"input": "a", "output": "b"}, "User: a\n\nAssistant:", " b\n\n"),
        ({"system_prompt": "s", "question": "a", "response": "b"}, "System: s\n\nUser: a\n\nAssistant:", " b\n\n"),
        ({"Instruction": "a", "OUTPUT": "b", "history": []}, "User: a\n\nAssistant:", " b\n\n"),
    ],
)
def test_the_names_in_use(record, prompt, response, tmp_path):
    (first, _), _ = examples(tmp_path, record, OTHER)
    assert (first.prompt.decode(), first.response.decode()) == (prompt, response)


TALK = [
    ("system", "Be brief."),
    ("user", "1 + 1?"),
    ("assistant", "Let me see."),
    ("tool", "2"),
    ("assistant", "It is 2."),
    ("user", "Thanks."),
]
SHAREGPT = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("form", ["messages", "conversations", "as text", "system beside"])
def test_conversations_learn_what_the_assistant_says(form, tmp_path, small):
    record = {"messages": [{"role": role, "content": text} for role, text in TALK]}
    if form == "conversations":
        record = {"conversations": [{"from": SHAREGPT.get(role, role), "value": text} for role, text in TALK]}
    elif form == "as text":
        record = {"messages": json.dumps(record["messages"])}
    elif form == "system beside":
        record = {"system": "Be brief.", "conversations": record["messages"][1:]}
    found = load_corpus(jsonl(tmp_path / "x", *[record | {"id": ""}] * 2, *[{"text": str(i)} for i in range(40)]))
    talk = next(e for e in (*found.train, *found.held_out) if e.line <= 2)
    read, answers = zip(*talk.turns, strict=True)
    assert b"".join(answers).decode() == " Let me see.\n\n It is 2.\n\n"
    assert [r.decode() for r in read] == [
        "System: Be brief.\n\nUser: 1 + 1?\n\nAssistant:",
        "User: Function output:\n2\n\nAssistant:",
    ]
    assert any("2 conversations end with turns without an answer" in note for note in found.notes)
    tokenizer = RWKV_Dual.from_pretrained(small).tokenizer
    tokens, targets = in_batches(found, tokenizer, 200, 0).draw(len(found.train))
    learned = {tokenizer.decode([t for t in row if t != SKIP]) for row in targets.tolist()}
    assert " Let me see.\n\n It is 2.\n\n" in learned or talk in found.held_out
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert all(w == SKIP or w == following for w, following in zip(wanted, row[1:], strict=False))
    assert train("lora", tmp_path / "o.pth", str(tmp_path / "x"), small, **SHORT | {"ctx_len": 128}).fit.longer == 0


def test_tools_and_calls_are_written(tmp_path):
    record = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "1 + 1"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
        ],
    }
    (first, _), _ = examples(tmp_path, record, OTHER)
    assert first.prompt.startswith(b'System: Tools:\n[{"name": "add"}]\n\nUser: 1 + 1')
    assert first.response == b' ```json\n{"name": "add", "arguments": {}}\n```\n\n'


def test_a_template_of_ones_own(tmp_path):
    turns = {role: f"<{role}>{{text}}</{role}>" for role in ("system", "user", "assistant", "tool")}
    (tmp_path / "t.json").write_text(json.dumps(turns | {"collapse_blank_lines": False}))
    (first, _), notes = examples(
        tmp_path, {"question": "a\n\nb", "answer": "c"}, OTHER, template=str(tmp_path / "t.json")
    )
    assert first.turns == ((b"<user>a\n\nb</user><assistant>", b"c</assistant>"),)
    assert any("t.json" in note for note in notes)
    for content, words in (("{", "cannot be read"), ('{"usr": ""}', "'usr'"), ('{"user": "x"}', "{text}")):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ParameterError, match=words):
            examples(tmp_path, OTHER, template=str(tmp_path / "t.json"))
    with pytest.raises(ParameterError, match="did you mean world"):
        examples(tmp_path, OTHER, template="wrld")


def test_fields_that_are_not_used_are_refused_or_ignored(tmp_path):
    records = [{"text": str(i), "id": i, "meta": {"a": i} if i % 2 else {}, "note": ""} for i in range(10)]
    with pytest.raises(ParameterError) as refusal:
        examples(tmp_path, *records)
    assert "'id', 'meta' would not be used" in str(refusal.value) and 'ignore=["id", "meta"]' in str(refusal.value)
    with pytest.raises(ParameterError, match="the field 'meta' would not be used .*line 2"):
        examples(tmp_path, *records, ignore=["id"])
    for ignore in (["id", "meta"], ["i*", "m*"], ["*d", "meta"]):
        found, notes = examples(tmp_path, *records, ignore=ignore)
        assert len(found) == 10 and any("id (10), meta (5)" in note for note in notes)
    both = {"text": "a", "instruction": "b", "output": "c"}
    with pytest.raises(ParameterError, match="only one of the two can be meant"):
        examples(tmp_path, both, OTHER)


def test_one_of_two_forms_is_chosen_by_ignoring_the_other(tmp_path):
    both = [{"text": f"a{i}", "instruction": f"b{i}", "output": "c"} for i in range(3)]
    assert examples(tmp_path, *both, ignore=["text"])[0][0].text == b"User: b0\n\nAssistant: c\n\n"
    assert examples(tmp_path, *both, ignore=["instruction", "output"])[0][0].text == b"a0"


def says(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "it must be an object.*'chosen', 'rejected'"),
        ({"id": ""}, "it must be an object"),
        ("a text", "it must be an object"),
        ({"messages": "Hello"}, "is text, and no JSON"),
        ({"messages": {"role": "user"}}, "must be a list of messages"),
        (says(("usr", "a"), ("assistant", "b")), "message 1 has the role 'usr'"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "assistant", "content": "a", "image": "x.png"}]}, "message 1 .* has 'image'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}, "no text"),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" is no text'),
        ({"instruction": "a"}, '"response" is missing'),
        ({"answer": "a"}, '"prompt" is missing'),
        ({"question": "a", "answer": "b", "output": "c"}, '"output" beside "answer"'),
        ({"question": "a", "prompt": "b", "output": "c"}, '"prompt" beside "question"'),
        ({"text": "a", "Text": "b"}, "twice, in other letters"),
    ],
)
def test_malformed_records_are_named_by_their_line(record, words, tmp_path):
    with pytest.raises(ParameterError, match=rf"x, line 2:? .*{words}"):
        examples(tmp_path, OTHER, record)


EMPTY = {
    "no fields": ({}, "an object without fields"),
    "empty text": ({"text": ""}, 'no text in "text"'),
    "blank text": ({"Text": " \n"}, 'no text in "text"'),
    "null": ({"text": None}, 'no text in "text"'),
    "empty answer": ({"prompt": "a", "response": ""}, 'no text in "response"'),
    "blank answer": ({"instruction": "a", "input": "b", "output": " \n"}, 'no text in "output"'),
    "null answer": ({"question": None, "answer": None}, 'no text in "answer"'),
    "empty question": ({"question": "", "answer": "a"}, "a turn of the user without text"),
    "no messages": ({"messages": []}, 'no messages in "messages"'),
    "null messages": ({"conversations": None}, 'no messages in "conversations"'),
    "blank cell": ({"messages": "  "}, 'no messages in "messages"'),
    "silent assistant": (says(("user", "a"), ("assistant", "")), "a turn of the assistant without text"),
    "blank turn": (says(("user", "a"), ("assistant", " \n")), "a turn of the assistant without text"),
    "one silent turn": (
        says(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")),
        "a turn of the assistant without text",
    ),
    "no assistant": (says(("user", "a")), "no turn of the assistant"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_records_are_left_out_and_counted(kind, tmp_path):
    record, words = EMPTY[kind]
    found, notes = examples(tmp_path, OTHER, record, OTHER | {"text": "c"}, record)
    assert {e.line for e in found} == {1, 3}
    note = f"2 of 4 records are empty and were left out: {words} (2); the first is {tmp_path / 'x'}, line 2."
    assert note in notes
    with pytest.raises(ParameterError, match="2 of 2 records are empty .*\n.*leaves 0 to learn"):
        examples(tmp_path, record, record)
    with pytest.raises(ParameterError, match="1 of 2 records are empty .*\n.*leaves 1 to learn"):
        examples(tmp_path, OTHER, record)


def test_empty_records_are_in_plan_log_and_result(tmp_path, small, caplog):
    data = jsonl(tmp_path / "x", *({"text": "" if i % 3 == 0 else f"= {i} =" * 30} for i in range(30)))
    note = "10 of 30 records are empty and were left out"
    plan = plan_training("full", small, data=str(data), steps=1, batch_size=1, ctx_len=8)
    assert any(note in line for line in plan.notes)
    with caplog.at_level("INFO", "rwkv_lab"):
        result = train("full", tmp_path / "o.pth", str(data), small, log_folder=tmp_path, **SHORT)
    assert any(note in line for line in result.notes) and note in caplog.text
    assert note in (tmp_path / "log.json").read_text()


def test_fields_with_content_of_an_empty_record_are_refused_all_the_same(tmp_path):
    with pytest.raises(ParameterError, match="the field 'title' would not be used"):
        examples(tmp_path, OTHER, {"text": "", "title": "a"}, {"text": "c"})


def test_fields_inside_messages_are_ignored_by_name_too(tmp_path):
    message = {"role": "assistant", "content": "b", "weight": 0, "meta": {"a": 1}}
    records = [{"messages": [{"role": "user", "content": str(i)}, message]} for i in range(3)]
    with pytest.raises(ParameterError, match="line 1: message 2 .* has 'weight'"):
        examples(tmp_path, *records)
    found, notes = examples(tmp_path, *records, ignore=["wei*", "meta"])
    assert len(found) == 3 and any("messages.meta (3), messages.weight (3)" in note for note in notes)


def test_a_field_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "x").write_text('{"text": "a"}\n{"text": "b", "text": "c"}')
    with pytest.raises(ParameterError, match="line 2.*'text' stands twice"):
        load_corpus(str(tmp_path / "x"))


def test_a_folder_takes_its_data_and_lists_what_it_skipped(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub" / ".cache").mkdir(parents=True)
    for i in range(3):
        jsonl(folder / "sub" / f"{i}.part", *({"text": f"{i}.{j}"} for j in range(10)))
    for name in ("README.md", "LICENSE", "LICENCE-2.txt", "SHA256SUMS", ".gitattributes", "sub/.cache/x"):
        (folder / name).write_text("some words")
    (folder / "sums").write_text("0" * 64 + "  sub/0.part\n")
    (folder / "dataset_info.json").write_text('{"text": "x"}')
    (folder / "settings").write_text('{\n"lr": 3\n}')
    (folder / "empty.txt").write_text("")
    (folder / "cover.png").write_bytes(b"\x89PNG" + bytes(100))
    found = load_corpus(str(folder))
    assert len((*found.train, *found.held_out)) == 30
    (skipped,) = [note for note in found.notes if "skipped" in note]
    assert skipped.startswith("11 of 14 files were skipped")
    for words in ("a card", "checksums", "hidden", "describes the data", "one JSON object", "empty", "PNG image"):
        assert words in skipped
    assert any("sub/0.part, sub/1.part, sub/2.part" in note for note in found.notes)
    (folder / "sub" / "2.part").rename(folder / "sub" / "test-2.part")
    assert any("for testing" in note and "sub/test-2.part" in note for note in load_corpus(str(folder)).notes)
    jsonl(folder / "sub" / "3.part", {"text": "a"}, {"txt": "b"})
    with pytest.raises(ParameterError, match="3.part, line 2"):
        load_corpus(str(folder))


def test_a_folder_of_texts_is_as_before_but_for_cards(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 50)
    before = load_corpus(str(tmp_path))
    (tmp_path / "README.md").write_text("A card.")
    (tmp_path / "settings.json").write_text('{"a": 1}')
    after = load_corpus(str(tmp_path))
    assert isinstance(after, Corpus) and (after.train, after.held_out) == (before.train, before.held_out)
    assert before.notes == () and "README.md (a card" in after.notes[0] and "settings.json" in after.notes[0]


def test_a_folder_of_one_sort_only(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    jsonl(tmp_path / "b", {"text": "a"}, {"text": "b"})
    with pytest.raises(ParameterError, match=r"mixes files 1 of records \(b\), 1 of text \(a.txt\)"):
        load_corpus(str(tmp_path))


def test_a_folder_of_tokens(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full(100, i, np.uint16))
    found = load_corpus(str(tmp_path))
    assert isinstance(found, TokenCorpus)
    assert found.train.tolist() == [0] * 90 + [1] * 90 + [2] * 90 and len(found.held_out) == 30


def test_options_without_any_effect_are_named(tmp_path):
    path, template = tmp_path / "a.jsonl", tmp_path / "t.json"
    path.write_text("\n".join(json.dumps({"text": f"t {i}", "id": i + 1}) for i in range(9)))
    template.write_text("{}")
    notes = load_corpus(str(path), ["id", "meta*"], str(template)).notes
    assert "ignore: no field is matched by 'meta*'." in notes
    assert any("wrote nothing: no record is a conversation" in note for note in notes)


def test_fields_of_messages_and_of_parts_are_not_lost(tmp_path):
    path = tmp_path / "a.jsonl"

    def load(message, *ignore):
        talks = [[{"role": "user", "content": f"u {i}"}, {"role": "assistant", **message}] for i in range(9)]
        path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
        return load_corpus(str(path), ignore)

    part = {"type": "text", "text": "a", "thinking": "b"}
    with pytest.raises(ParameterError, match="line 1: message 2, part 1 of its content has 'thinking'"):
        load({"content": [part]})
    for ignored in ("thinking", "messages.thinking", "messages.*"):
        assert any("messages.thinking (9)" in note for note in load({"content": [part]}, ignored).notes)
    assert any(
        "no template writes" in note and "name (9)" in note for note in load({"content": "a", "name": "Bob"}).notes
    )
    with pytest.raises(ParameterError, match="the roles 'assistant' and 'human'; only one"):
        load({"content": "a", "from": "human"})
    path.write_text('{"messages": ["hello", "there"]}')
    with pytest.raises(ParameterError, match="line 1: message 1 is no object with a role"):
        load_corpus(str(path))
