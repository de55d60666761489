"""Tokenizers that are saved with a model: AutoTokenizer gives our ids, our text, and our conversations."""

import json
import random
from pathlib import Path

import pytest
from bpe_files import write_bpe
from random_models import make_layout, write_model

from rwkv_lab.convert import convert, to_huggingface
from rwkv_lab.errors import ParameterError
from rwkv_lab.model import render_turns
from rwkv_lab.tokenizer import load_tokenizer, tokenizer_for

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
ALPHABET = [
    *"abc XYZ09\n\t.,<|>\x00\x17\u00a0",
    "ß",
    "中",
    "你好",
    "한",
    "😀",
    "\n\n",
    "  ",
    "<|endoftext|>",
    "User",
    "\u200b",
]


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(ALPHABET, k=draw.randrange(1, 30))) for _ in range(count)]


def saved(folder, vocab_size, **options):
    """(our tokenizer, that of the folder)"""
    path = write_model(folder / "m.pth", make_layout("7.0", head_size=16, n_head=1, dim_ffn=8, vocab_size=vocab_size))
    out = to_huggingface(path, folder / "out", **options).out
    return transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("world"), 65536)


def test_world_ids(world):
    assert world(" Hello").input_ids == [36786] and world("Hello ").input_ids == [33155, 33]
    assert (world.bos_token_id, world.eos_token_id, world.pad_token_id) == (0, 0, 0)
    assert world.vocab_size == 65530


def test_ids_of_random_texts_are_ours(world):
    ours = load_tokenizer("world")
    for text in random_texts(10_000):
        ids = ours.encode(text)
        assert world(text).input_ids == ids, repr(text)
    for text in random_texts(200):
        assert world.decode(ours.encode(text)) == text


def test_tokens_without_text(world):
    assert world.decode([0], skip_special_tokens=True) == world.decode([65535]) == "" and world.decode([0]) != ""
    assert world.decode([36786, 0, 65535, 36786], skip_special_tokens=True) == " Hello Hello"


def test_batches_are_padded_on_the_left(world):
    batch = world([" Hello", " Hello Hello"], padding=True)
    assert batch.input_ids == [[0, 36786], [36786, 36786]] and batch.attention_mask == [[0, 1], [1, 1]]


def test_a_tokenizer_is_saved_again(world, tmp_path):
    world.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again(" Hello\n\n你好").input_ids == world(" Hello\n\n你好").input_ids and again.eos_token_id == 0


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be kind.\n\n \nBe short. "}, {"role": "user", "content": "a\r\n\r\nb\n c"}],
    [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get", "arguments": {"a": [1, "ß"]}}}],
        },
        {"role": "tool", "content": "sunny\n\n\n20"},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
@pytest.mark.parametrize("tools", [None, [{"name": "get", "parameters": {"a": "ü <b>"}}]], ids=bool)
def test_the_chat_template_is_ours(world, messages, tools):
    ours = "".join(turn.text for turn in render_turns(messages, tools=tools))
    found = world.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert found == ours + "Assistant:"
    for think, end in ((True, "<think"), (False, "<think></think")):
        asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": think}
        assert world.apply_chat_template(messages, tools=tools, **asked) == f"{ours}Assistant: {end}"


@pytest.mark.parametrize("vocab_size", [256, 257])
def test_bytes(vocab_size, tmp_path):
    theirs, ours = saved(tmp_path, vocab_size), tokenizer_for(vocab_size)
    for text in random_texts(200):
        assert theirs(text).input_ids == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_text


def test_a_tokenizer_json(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: i + 1 for i, letter in enumerate(alphabet)} | {"<|endoftext|>": 0}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "20B.json"))
    theirs = saved(tmp_path, 260, tokenizer=str(tmp_path / "20B.json"))
    ours = load_tokenizer(tmp_path / "20B.json", 260)
    for text in random_texts(200):
        assert theirs(text).input_ids == ours.encode(text)
    assert theirs.eos_token_id == 0


def test_a_vocabulary_that_tells_no_tokenizer(tmp_path):
    path = write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=50277))
    result = convert(path, "fla", tmp_path / "out")
    assert any("20B_tokenizer.json" in note for note in result.notes)
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0
    with pytest.raises(ParameterError, match="256 or 257 tokens"):
        convert(path, "fla", tmp_path / "other", tokenizer="bytes")


def test_a_path_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=write_bpe(tmp_path / "20B.json", ["text"])))
    for i, which in enumerate(("~/20B.json", tmp_path / "20B.json", Path("~/20B.json"))):
        out = convert(path, "fla", tmp_path / str(i), tokenizer=which).out
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "20B.json").read_bytes()
