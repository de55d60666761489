"""llama.cpp reads what is written: our logits, our tokens."""

import json
import random
import subprocess
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from bpe_files import BLANKS, write_bpe
from pairwise import each
from random_models import make_layout, make_tokens, relative_rms, write_model

from rwkv_lab import RWKV_Dual
from rwkv_lab.checkpoint import Layout, open_checkpoint
from rwkv_lab.convert import to_gguf
from rwkv_lab.model import render_turns
from rwkv_lab.tokenizer import load_tokenizer

if find_spec("llama_cpp") is None or find_spec("gguf") is None:
    pytest.skip("llama-cpp-python is not installed", allow_module_level=True)

TOKENS = make_tokens(1, 37)
SIZES = {
    "as usual": {"n_head": 2, "head_size": 64, "dim_ffn": 96},
    "one head": {"n_head": 1, "head_size": 64, "dim_ffn": 96},
    "large heads": {"n_head": 1, "head_size": 128, "dim_ffn": 160},
    "one layer": {"n_layer": 1, "n_head": 2, "head_size": 64, "dim_ffn": 96},
}
LIMIT = 2e-5  # relative RMS in float32: two implementations of the same formulas
KINDS = ("F16", "BF16", "Q8_0", "Q4_0")


def asked(path, folder, ids=(), texts=(), quantised="", messages=()) -> dict[str, np.ndarray]:
    """What llama.cpp gives."""
    request = {"model": str(path), "ids": list(ids), "texts": list(texts), "quantised": quantised}
    request["messages"] = list(messages)
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).parent / "llama_logits.py"
    command = [sys.executable, str(script), str(folder / "request.json"), str(folder / "answer.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "answer.npz"))


def our_logits(path):
    return RWKV_Dual.from_pretrained(path, dtype=torch.float32).requires_grad_(False)(TOKENS)[0][0]


def compared(source, kind, folder, **options) -> tuple[float, float]:
    """Relative RMS between llama.cpp's logits and ours of the written file, and between those and the source's."""
    out = to_gguf(source, folder / f"{kind}.gguf", dtype=kind, overwrite=True, **options).out
    theirs, ours = asked(out, folder, TOKENS[0].tolist())["logits"], our_logits(out)
    assert theirs.shape == ours.shape
    return relative_rms(theirs, ours), relative_rms(ours, our_logits(source))


@pytest.mark.parametrize("version", ["6.0", "7.0"])
def test_logits(version, tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout(version, vocab_size=257, **SIZES["as usual"]))
    assert compared(source, "F32", tmp_path)[0] < LIMIT


@pytest.mark.parametrize("version", ["6.0", "7.0"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_fewer_bits(kind, version, tmp_path):
    """llama.cpp rounds what goes into a product as the weights are rounded, to 8 bits where they have 4: that takes its
    logits about as far from ours as rounding the weights took ours from the source's."""
    source = write_model(tmp_path / "m.pth", make_layout(version, vocab_size=257, **SIZES["as usual"]))
    found, by_weights = compared(source, kind, tmp_path)
    assert found < 2 * by_weights


@pytest.mark.parametrize(
    ("version", "kind"), each(["7.0", "6.0"], ["Q4_0", "Q4_K_M", "Q5_K_S", "Q6_K", "Q3_K_M", "Q2_K", "Q2_K", "Q3_K_M"])
)
def test_files_that_llama_cpp_quantised(kind, version, tmp_path):
    layout = make_layout(version, vocab_size=257, n_head=4, head_size=64, dim_ffn=512)
    source = write_model(tmp_path / "m.pth", layout)
    out = to_gguf(source, tmp_path / "m.gguf", dtype="F16").out
    theirs = asked(out, tmp_path, TOKENS[0].tolist(), quantised=kind)["logits"]
    path = tmp_path / "m.gguf.quantised"
    with open_checkpoint(path) as ck:
        assert ck.kind == "model" and any("_K" in name or name == "Q4_0" for name in ck.quantised), ck.quantised
    ours = our_logits(path)
    assert relative_rms(theirs, ours) < 2 * relative_rms(our_logits(source), ours)


@pytest.mark.parametrize("version", ["6.0", "7.0"])
@pytest.mark.parametrize("size", list(SIZES)[1:])
def test_dimensions(size, version, tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout(version, vocab_size=257, **SIZES[size]))
    assert compared(source, "F32", tmp_path)[0] < LIMIT


def test_weights_that_are_rescaled(tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout("6.0", n_layer=5, vocab_size=257, **SIZES["as usual"]))
    assert compared(source, "F32", tmp_path, rescale=2)[0] < LIMIT


def test_a_file_without_a_vocabulary(tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=300, **SIZES["as usual"]))
    assert compared(source, "F32", tmp_path)[0] < LIMIT


TEXTS = [
    "Hello, world!",
    " Hello",
    "Hello ",
    "  two blanks before, and after  ",
    "The quick brown fox jumps over the lazy dog.",
    "User: Hi\n\nAssistant: Hi. I am your assistant.\n\n",
    "def f(x):\n    return x ** 2  # a comment\n",
    "\t\ttabs\tand\r\nline ends\r\n",
    "3.14159265358979 1,000,000 0x7fff 2026-11-28",
    "https://example.org/a?b=c&d=%20#e",
    "\\n is no line end, \\x41 no letter A",
    "'single' \"double\" `back` «guillemets» „Gänsefüßchen“",
    "\xdcn\xefc\xf6d\xe9 c\xf6mb\xefn\xefng: e\u0301 a\u0308 o\u0302",
    "Größe, Straße, Äpfel, Öl",
    "Où est la bibliothèque ? Ça va très bien.",
    "¿Dónde está el niño? ¡Aquí!",
    "São Paulo, coração, não",
    "Đây là một câu tiếng Việt.",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Árvíztűrő tükörfúrógép",
    "İstanbul'da ığdır çiçeği",
    "Съешь же ещё этих мягких французских булок",
    "Жебракують філософи при ґанку церкви в Гадячі",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "דג סקרן שט בים מאוכזב",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ",
    "\u0631\u0648\u0628\u0627\u0647 \u0642\u0647\u0648\u0647\u200c\u0627\u06cc \u0633\u0631\u06cc\u0639",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "আমি বাংলায় গান গাই",
    "ਪੰਜਾਬੀ ਭਾਸ਼ਾ",
    "தமிழ் மொழி இனிமை",
    "తెలుగు భాష",
    "ಕನ್ನಡ ನುಡಿ",
    "മലയാളം ഭാഷ",
    "සිංහල භාෂාව",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ພາສາລາວ",
    "ភាសាខ្មែរ",
    "မြန်မာဘာသာ",
    "საქართველო",
    "Հայերեն լեզու",
    "አማርኛ ቋንቋ",
    "天地玄黃，宇宙洪荒。",
    "我们的目标是星辰大海。",
    "いろはにほへと ちりぬるを",
    "カタカナとひらがなと漢字。",
    "키스의 고유조건은 입술끼리 만나야 한다",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3 \U0001f44d\U0001f3fd emoji \u2603\ufe0e",
    "\U00010348 \U0001d49c \U0001f9ff \U0002070e \U000e0001",
]


def test_tokens_of_fifty_texts_in_several_scripts_and_the_chat_template(tmp_path):
    world = load_tokenizer("world")
    layout = Layout("7.0", 1, 32, 32, 32, 65536, 1, 32, {"w": 1, "a": 1, "g": 1})
    source = write_model(tmp_path / "m.pth", layout)
    out = to_gguf(source, tmp_path / "m.gguf", dtype="F16", verify=False).out
    assert len(set(TEXTS)) == 50
    messages = [{"role": role, "content": f"{role}\n\nsays "} for role in ("system", "user", "assistant", "user")]
    found = asked(out, tmp_path, texts=TEXTS, messages=messages)
    for i, text in enumerate(TEXTS):
        assert found[f"text {i}"].tolist() == world.encode(text), text
    assert found["prompt"] == "".join(turn.text for turn in render_turns(messages)) + "Assistant:"
    assert found["ends"].tolist() == [0, 0]


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("nfc", [False, True])
def test_tokens_of_a_tokenizer_json(digits, nfc, tmp_path):
    """Of every text without a normaliser; with one, of those that it leaves as they are, and the plan says so."""
    size = write_bpe(tmp_path / "tokenizer.json", TEXTS, 900, digits, nfc)
    source = write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=size + 5, **SIZES["as usual"]))
    out = to_gguf(source, tmp_path / "m.gguf", dtype="F16", tokenizer=tmp_path / "tokenizer.json").out
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    draw = random.Random(0)
    pieces = [
        *"abcXYZ059 \n\t.,'<|>-_",
        *BLANKS,
        " " * 7,
        "ß",
        "é",
        "中",
        "한",
        "😀",
        "'ll",
        "\u00a0",
        "\u3000",
        " 123456",
    ]
    texts = [*TEXTS, *("".join(draw.choices(pieces, k=draw.randrange(1, 40))) for _ in range(300))]
    found = asked(out, tmp_path, texts=texts)
    composed = [i for i, text in enumerate(texts) if not nfc or unicodedata.normalize("NFC", text) == text]
    assert len(composed) >= len(texts) - 3
    for i in composed:
        assert found[f"text {i}"].tolist() == ours.encode(texts[i]), texts[i]


def test_tokens_of_bytes(tmp_path):
    source = write_model(tmp_path / "m.pth", make_layout("7.0", vocab_size=257, **SIZES["as usual"]))
    found = asked(to_gguf(source, tmp_path / "m.gguf").out, tmp_path, texts=["abc äöü\n"])
    assert found["text 0"].tolist() == load_tokenizer("bytes", 257).encode("abc äöü\n")
