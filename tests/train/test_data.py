"""Training text and held-out text: corpora, files, folders and JSONL, as tokens in batches."""

import json
import random
from pathlib import Path

import pytest
from tiny_training import SHORT

from rwkv_lab.errors import ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import examples, load_corpus, resume_path, train
from rwkv_lab.train.batches import Rows, in_batches


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(bytes(random.Random(0).choices(b"abcd", k=20_000)))
    corpus = load_corpus(str(path))
    assert corpus.train + corpus.held_out == path.read_bytes() and len(corpus.held_out) == 2000
    path.write_text("short")
    with pytest.raises(ParameterError, match="10,000"):
        load_corpus(str(path))


def test_held_out_text_is_not_in_the_training_text(in_full):
    for name in ("english", "python"):
        corpus = load_corpus(name)
        assert len(corpus.train) > 8 * len(corpus.held_out) > 160_000
        paragraphs = [paragraph for paragraph in corpus.held_out.split(b"\n\n") if len(paragraph) > 100]
        repeated = sum(paragraph in corpus.train for paragraph in paragraphs)
        assert len(paragraphs) > 50
        assert repeated <= {"english": 0, "python": 0.05 * len(paragraphs)}[name]  # licences repeat from file to file


def test_the_split_does_not_depend_on_the_order_of_a_folder(monkeypatch):
    expected = load_corpus("python")
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert load_corpus("python") == expected


def jsonl(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_only_responses_are_learned(small, tmp_path):
    lines = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(20)]
    model = RWKV_Dual.from_pretrained(small)
    rows = in_batches(load_corpus(jsonl(tmp_path / "sums.jsonl", *lines)), model.tokenizer, 16, seed=0)
    assert isinstance(rows, Rows)
    tokens, targets = rows.draw(20)
    decode = model.tokenizer.decode
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        learned = [t for t in wanted if t != -100]
        prompt = decode([t for t in row if t]).split("=")[0]
        assert learned[-1] == 0 and decode(learned[:-1]) == str(int(prompt.removesuffix("+1")) + 1)
    assert rows.held_out_bytes == sum(len(e.response) for e in load_corpus(str(tmp_path / "sums.jsonl")).held_out)
    settings = dict(data=str(tmp_path / "sums.jsonl"), base=small, **SHORT | {"steps": 20, "ctx_len": 8}, lr=1e-2)
    result = train("lora", tmp_path / "out.pth", **settings)
    assert result.bits_after < result.bits_before


def test_texts_of_jsonl_are_joined(small, tmp_path):
    data = jsonl(tmp_path / "t.jsonl", *({"text": f"line {i} of a text that goes on"} for i in range(30)))
    result = train("full", tmp_path / "out.pth", data, small, **SHORT | {"steps": 20}, lr=1e-3)
    assert result.bits_after < result.bits_before and result.held_out_bytes > 0


def test_json_is_never_used_as_training_text(tmp_path):
    """By its bytes; and what is called JSON and is none is refused, since it may be damaged."""
    lines = [{"text": f"text number {i}"} for i in range(500)]
    expected = load_corpus(jsonl(tmp_path / "a.jsonl", *lines))
    for name in ("a.JSONL", "a.json", "b.Json", "a.txt", "a"):
        assert load_corpus(jsonl(tmp_path / name, *lines)).train == expected.train
    for i, text in enumerate((json.dumps(lines), json.dumps(lines, indent=1), "\n" + json.dumps(lines))):
        (tmp_path / f"{i}.txt").write_text(text)
        found = load_corpus(str(tmp_path / f"{i}.txt"))
        assert {e.response for e in found.train} == {e.response for e in expected.train}
    none, whole = "line [12]: this is no JSON", "one JSON object over several lines"
    for i, (text, words) in enumerate((("[\n", none), ("the cat\n" * 2000, none), ('{\n"text": "a"\n}', whole))):
        (tmp_path / f"{i}.json").write_text(text)
        with pytest.raises(ParameterError, match=words):
            load_corpus(str(tmp_path / f"{i}.json"))


def test_equal_examples_are_on_one_side(tmp_path):
    lines = [{"text": f"{i % 10}"} for i in range(100)]
    examples = load_corpus(jsonl(tmp_path / "t.jsonl", *lines))
    assert not {e.response for e in examples.train} & {e.response for e in examples.held_out}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "0 different examples"),
        ([{"text": "a"}, {"text": "a"}], "1 different example;"),
        ([{"text": "a"}, '{"text": "b'], "line 2: this is no JSON"),
        ([{"text": "a"}, "", [1]], "line 3: it must be an object"),
        ([{"prompt": "a"}], 'line 1: "response" is missing'),
        ([{"response": "a"}], 'line 1: "prompt" is missing'),
        ([{"prompt": "a", "response": 1}], 'line 1: "response" is no text'),
        ([{"prompt": "a", "response": ""}], r"1 of 1 record is empty .*line 1.\n.*leaves 0"),
        ([{"text": "a", "prompt": "b"}], "only one of the two"),
        (['{"text": "\\ud800"}'], "surrogate"),
        (["[" * 100_000], "line 1: this is no JSON"),
    ],
)
def test_broken_lines_are_named(lines, words, tmp_path):
    with pytest.raises(ParameterError, match=words):
        load_corpus(jsonl(tmp_path / "x.jsonl", *lines))


def test_what_cannot_be_read_is_refused_by_its_name(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    jsonl(tmp_path / "x.jsonl", {"text": "a"})

    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(examples, "open", refuse, raising=False)
    for data in (tmp_path, tmp_path / "x.jsonl"):
        with pytest.raises(ParameterError, match=r"(a.txt|b.txt|x.jsonl) cannot be read: Permission denied"):
            load_corpus(str(data))


def test_too_little_text_is_refused(small, tmp_path, texts):
    out = tmp_path / "out.pth"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    prompts = jsonl(tmp_path / "p.jsonl", *({"prompt": "p" * 40 + str(i), "response": "r"} for i in range(5)))
    short = jsonl(tmp_path / "s.jsonl", {"text": "a"}, {"text": "b"})
    for data, ctx_len, words in (
        (str(tmp_path / "empty"), 16, "0 files"),
        (str(tmp_path / "empty.txt"), 16, "0 bytes"),
        (str(texts), 5000, "smaller ctx_len"),
        (short, 16, "smaller ctx_len"),
        (prompts, 16, r"line \d: the prompt has 41 tokens"),
    ):
        with pytest.raises(ParameterError, match=words):
            train("lora", out, data, small, **SHORT | {"ctx_len": ctx_len})
    assert not out.exists() and not resume_path(out).exists()
