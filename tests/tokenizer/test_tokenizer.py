"""World, tokenizer.json and bytes: ids, whole characters in streams, and files that are refused."""

import ast
import copy
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rwkv7 import make_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rwkv_lab.errors import CorruptFileError, ParameterError, UnsafeFileError
from rwkv_lab.model import load_tokenizer
from rwkv_lab.tokenizer import tokenizer_for
from rwkv_lab.tokenizer import world as world_vocabulary

TEXT = "naïve 日本語 👩‍🔬 \ufffd\n\n  the end"
MANY = settings(max_examples=200, deadline=None)


def lines_of_bytes() -> list[str]:
    return [f"{b + 1} {(chr(b) if b < 128 else bytes([b]))!r} 1" for b in range(256)]


def vocabulary(tmp_path, *more: str):
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join([*lines_of_bytes(), *more]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world", 65536)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """As 20B is made: NFC, byte-level BPE, an end of text, runs of spaces as added tokens."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    ends = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=ends, initial_alphabet=letters, show_progress=False)
    library.train_from_iterator(["the theory of the end"] * 9, trainer)
    library.add_tokens([AddedToken(" " * n, normalized=False) for n in (2, 3, 4)])
    path = tmp_path_factory.mktemp("json") / "byte_level"  # no suffix: the content decides
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def with_metaspace(tmp_path_factory):
    """As SentencePiece models are converted: spaces as ▁, bytes as <0x41> where no piece fits."""
    pieces = [f"<0x{b:02X}>" for b in range(256)] + ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "▁e"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "e")]
    library = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("json") / "metaspace.json"
    library.save(str(path))
    return path


def streamed(tokenizer, ids) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.feed, ids), stream.close()]


def test_world_ids(world):
    assert world.encode(" Hello") == [36786] and world.encode("Hello ") == [33155, 33]
    assert world.encode("\n\n") == [261] and world.encode("User") == [24281] and world.encode("\ufffd") == [19232]
    assert world.decode([36786]) == " Hello" and world.decode_bytes([228]) == b"\xe3"
    assert world.end_of_text == 0 and world.vocab_size == 65536


def test_world_decodes_the_end_of_text_and_padding_as_nothing(world):
    assert world.decode([0, 36786, 65530, 65535, 65529]) == " Hello" + " " * 128
    for wrong in (65536, -1):
        with pytest.raises(ParameterError, match=f"Token {wrong}"):
            world.decode([wrong])


@MANY
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_world_takes_the_longest_match_and_loses_nothing(world, text):
    ids = world._longest_matches(text.encode())
    assert ids == world._by_library(text)  # which encodes long texts
    assert world.decode(ids) == text and world.encode(text.encode()) == ids


def test_world_loads_the_library_for_long_texts_alone(monkeypatch):
    """Its tables take 240 MB."""
    by_library = []
    monkeypatch.setattr(world_vocabulary.WorldTokenizer, "_by_library", lambda self, text: by_library.append(text))
    tokenizer = world_vocabulary.WorldTokenizer()
    assert tokenizer.encode(" Hello" * 9) == [36786] * 9
    assert tokenizer.encode(b"\xff") == [256] and not by_library
    long = " " * world_vocabulary._FEW
    tokenizer.encode(long)
    tokenizer.encode(" Hello")
    assert by_library == [long, " Hello"]
    assert tokenizer.encode(b"\xff") == [256]


@MANY
@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_are_tokens_too(world, data):
    for tokenizer in (world, load_tokenizer("bytes", 257), load_tokenizer("bytes", 256)):
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@MANY
@given(data=st.data())
def test_a_stream_gives_the_same_text_in_whole_characters(world, byte_level, data):
    """Any tokens at all, also ones that no text has: the pieces make up the text, and no character is in two."""
    name = data.draw(st.sampled_from(["world", "bytes", "json"]))
    tokenizer = {"world": world, "bytes": load_tokenizer("bytes", 257), "json": load_tokenizer(byte_level)}[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("which", ["world", "bytes", "byte_level", "with_metaspace"])
def test_text_streams_back_without_a_broken_character(which, request):
    path = request.getfixturevalue(which) if which in ("byte_level", "with_metaspace") else which
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert "".join(pieces).count("\ufffd") == 1  # the one in the text
    assert sum(map(bool, pieces)) > 10  # it did not wait for the end
    cut = streamed(tokenizer, tokenizer.encode("日")[:-1])
    assert "".join(cut[:-1]) == "" and (cut[-1].strip("\ufffd") == "" if len(cut) > 1 else True)


def test_a_legitimate_replacement_character_is_not_held_for_ever(world):
    stream = world.stream()
    assert [stream.feed(t) for t in (19232, 36786)] == ["\ufffd", " Hello"]


def test_json_end_of_text_and_added_tokens(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.end_of_text == 0
    assert tokenizer.decode([0]) == "" and tokenizer.encode("<|endoftext|>") == [0]
    four = tokenizer.encode("    ")
    assert len(four) == 1 and tokenizer.decode(four) == "    "
    with pytest.raises(ParameterError, match="Byte 1"):
        tokenizer.encode(b"a\xff")


def test_json_tokens_stand_for_the_bytes_that_the_library_means(byte_level):
    tokenizer, library = load_tokenizer(byte_level), Tokenizer.from_file(str(byte_level))
    every = "".join(map(chr, range(0x800)))  # characters in which every byte occurs that UTF-8 can have in two
    ids = tokenizer.encode(every)
    assert ids == library.encode(every).ids and tokenizer.decode(ids) == library.decode(ids)


def test_the_vocabulary_size_tells_the_tokenizer():
    assert tokenizer_for(65536).encode(" Hello") == [36786]
    assert tokenizer_for(257).encode("a") == [98] and tokenizer_for(256).encode("a") == [97]
    for size in (50277, 50304):
        with pytest.raises(ParameterError, match=f"{size}.*\n.*20B_tokenizer.json"):
            tokenizer_for(size)
    with pytest.raises(ParameterError, match="1234"):
        tokenizer_for(1234)


def test_a_model_takes_the_tokenizer_that_is_named(byte_level):
    model = make_model(vocab_size=360)
    with pytest.raises(ParameterError, match="360"):
        model.generate_with_streaming("x")
    model.tokenizer = byte_level
    assert model.tokenizer.vocab_size == 360
    assert model.batch_decode([model.tokenizer.encode("the end"), [359]]) == ["the end", ""]
    assert isinstance(model.generate_with_streaming("the", max_new_tokens=20), str)
    assert copy.deepcopy(model).tokenizer.encode("the") == model.tokenizer.encode("the")


def test_tokenizers_that_do_not_fit_are_refused(byte_level):
    model, size = make_model(vocab_size=260), load_tokenizer(byte_level).vocab_size
    with pytest.raises(ParameterError, match=rf"up to {size - 1}.*0 to 259"):
        model.tokenizer = byte_level
    with pytest.raises(ParameterError, match=r"up to 65529.*0 to 259"):
        model.tokenizer = "world"
    with pytest.raises(ParameterError, match=f"knows {size} tokens, the model 65536"):
        load_tokenizer(byte_level, 65536)
    with pytest.raises(ParameterError, match="260"):
        model.tokenizer = "bytes"
    with pytest.raises(ParameterError, match="'gpt2'"):
        model.tokenizer = "gpt2"


def test_a_world_vocabulary_by_path(tmp_path):
    path = vocabulary(tmp_path, "700 'ab' 2", "259 'abc d' 5", "301 ' \\u3042' 4", "302 b'\\xe3\\x81' 2")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 701
    ids = [700, 259, 34 - 1, 34 - 1, 301]
    assert tokenizer.encode("ababc d   あ") == ids and tokenizer.decode(ids) == "ababc d   あ"
    assert tokenizer.encode("あ".encode()[:2]) == [302]
    path.write_text(path.read_text().replace("'ab' 2", "'ba' 2"))
    os.utime(path, ns=(1, 1))
    assert load_tokenizer(path).encode("ba") == [700]  # a file that changed is read anew


@pytest.mark.parametrize(
    "line, error",
    [
        ("257 __import__('os').mkdir('{here}/ran') 3", UnsafeFileError),
        ("257 'a' if open('{here}/ran','w') else 'b' 1", UnsafeFileError),
        ("257 (lambda: 'x')() 1", UnsafeFileError),
        ("257 f'{{1}}' 1", UnsafeFileError),
        ("257 'ab' 3", CorruptFileError),
        ("257 12 2", CorruptFileError),
        ("257 'ab 2", CorruptFileError),
        ("0 'ab' 2", CorruptFileError),
        ("70000 'ab' 2", CorruptFileError),
        ("256 'ab' 2", CorruptFileError),
        ("257 '' 0", CorruptFileError),
        ("257 '\\ud800' 3", CorruptFileError),
        ("257 " + "(" * 5000 + " 2", CorruptFileError),
        ("", CorruptFileError),
        ("257 'a' 1 " + "x" * 20_000, CorruptFileError),
    ],
)
def test_vocabulary_lines_that_are_no_tokens_are_named_and_never_run(tmp_path, line, error):
    path = vocabulary(tmp_path, line.replace("{here}", str(tmp_path)), "400 'zz' 2")
    with pytest.raises(error, match="line 257") as caught:
        load_tokenizer(path)
    assert len(str(caught.value)) < 600 and str(caught.value).count("\n") < 3
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    cases = {"": "empty", "{": "no tokenizer.json", '{"a": 1}': "no tokenizer.json", "hello": "line 1"}
    for number, (content, words) in enumerate(cases.items()):
        path = tmp_path / str(number)
        path.write_text(content)
        with pytest.raises(CorruptFileError, match=words):
            load_tokenizer(path)
    (tmp_path / "latin").write_bytes(b"1 '\xe9' 1\n")
    with pytest.raises(CorruptFileError, match="byte 3"):
        load_tokenizer(tmp_path / "latin")
    path = vocabulary(tmp_path)
    path.write_text("\n".join(lines_of_bytes()[:200]))
    with pytest.raises(CorruptFileError, match="single byte 200"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "literal",
    [
        "'ab'",
        '"it\'s"',
        r"'\n\n'",
        r"'\''",
        r"b'\xff\x00'",
        "'\u00e9'",
        r"r'\n'",
        "'a' 'b'",
        "('ab')",
        "'''ab'''",
        '"a" \'b"\'',
    ],
)
def test_tokens_are_what_python_reads_in_their_literals(tmp_path, literal):
    value = ast.literal_eval(literal)
    token = value if isinstance(value, bytes) else value.encode()
    tokenizer = load_tokenizer(vocabulary(tmp_path, f"257 {literal} {len(token)}"))
    assert tokenizer.byte_strings()[257] == tokenizer.decode_bytes([257]) == token


@pytest.mark.parametrize("which", ["world", "bytes"])
def test_half_a_character_is_refused(which):
    with pytest.raises(ParameterError, match="Character 1"):
        load_tokenizer(which).encode("a\ud800")
