"""Text in any script and encoding of Unicode, told from other encodings and from binary by its bytes."""

import numpy as np
import pytest

from rwkv_lab.errors import ParameterError
from rwkv_lab.train.data import load_corpus

SCRIPTS = {
    "English": "The quick brown fox.\n",
    "French": "élève à l'école, où ça\n",
    "Russian": "Привет, мир! Это текст.\n",
    "Greek": "Γειά σου Κόσμε\n",
    "Hebrew": "שלום עולם\n",
    "Arabic": "مرحبا بالعالم هذا نص\n",
    "Hindi": "नमस्ते दुनिया यह\n",
    "Thai": "สวัสดีชาวโลก\n",
    "Chinese": "他们说：“今天天气很好！”\r\n人工智能 AI 2024\n",
    "Japanese": "これはペンです。ありがとう\n",
    "Korean": "안녕하세요. 한국어 텍스트입니다.\n",
    "pictures": "hi 😀 there 🎉 ok\n",
}


def read(path, content):
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    return (corpus.train + corpus.held_out).decode()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_text_of_any_script_without_a_mark(script, encoding, tmp_path, in_full):
    text = SCRIPTS[script] * 800
    assert read(tmp_path / "a.txt", text.encode(encoding)) == text


@pytest.mark.parametrize(
    "script, encoding",
    [
        ("French", "latin-1"),
        ("Russian", "cp1251"),
        ("Chinese", "gb18030"),
        ("Japanese", "shift_jis"),
        ("Japanese", "euc_jp"),
        ("Korean", "cp949"),
    ],
)
@pytest.mark.parametrize("zeros", [0, 1, 40])
def test_other_encodings_are_not_guessed(script, encoding, zeros, tmp_path):
    half = (SCRIPTS[script] * 800).encode(encoding)
    with pytest.raises(ParameterError) as refused:
        read(tmp_path / "a.txt", half + bytes(zeros) + half)
    assert "iconv -f latin1" not in str(refused.value)  # which would make other letters of all but one of these
    assert zeros or "iconv -f ENCODING -t utf-8 a.txt" in str(refused.value)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<i8"])
def test_tokens_do_not_pass_for_text(dtype, tmp_path):
    draw = np.random.default_rng(0)
    for ids in (draw.integers(0, 50257, 40000), np.minimum(draw.zipf(1.1, 40000), 50256)):
        for name in ("a.txt", "a.bin"):
            with pytest.raises(ParameterError, match="known kind|is binary"):
                read(tmp_path / name, ids.astype(dtype).tobytes())


def test_a_text_of_blanks_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="nothing but 20,000 blanks"):
        read(tmp_path / "a.txt", b" \n" * 10_000)
