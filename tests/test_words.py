"""Every concept has one term (docs/glossary.md); the words that the glossary rules out appear nowhere."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLOSSARY = "docs/glossary.md"
EXEMPT = {GLOSSARY, "LICENSE", "tests/test_words.py"}
# How often the words may still appear in a folder. These numbers only fall.
ALLOWED: dict[str, int] = {"tests": 1}  # a key in files of the commit before, in tests/fingerprints.py
PLAIN_ENGLISH = {  # what a word is allowed in
    "turned": r"turned[\s_]+(?:out|into|to|on|off|round)",
    "foreign": r"foreign[\s_]+formats?",
    "slip": r"slipp",
}


def ruled_out() -> list[str]:
    """The words of the third columns."""
    words = []
    for line in (ROOT / GLOSSARY).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3:
            words += re.findall(r"`([^`]+)`", cells[2])
    return sorted(set(words))


def in_any_form(word: str) -> re.Pattern:
    """The word, its inflections, and as a part of a name; words of a phrase may stand in two lines."""
    stem = re.escape(word.removesuffix("e")).replace(r"\ ", r"[\s_-]+(?:[#*/|]+\s*)?")
    ending = "(?:e|es|ed|ing)" if word.endswith("e") else "(?:s|es|ed|ing)?"
    exception = f"(?!{PLAIN_ENGLISH[word]})" if word in PLAIN_ENGLISH else ""
    return re.compile(f"(?<![a-z]){exception}{stem}{ending}(?![a-z])", re.IGNORECASE)


def text_of(path: Path) -> str:
    """The text of a file, with words in CamelCase apart; of a notebook, its cells."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text)


def found(name: str, text: str, words: list[str]) -> Iterator[str]:
    for word in words:
        form = in_any_form(word)
        if form.search(name):
            yield f"{name}: {word!r} in the file's name"
        for match in form.finditer(text):
            yield f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}"


def folder_of(name: str) -> str:
    """`rwkv_lab/merge` for files of packages and their tests, the first folder or the file itself for others."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] in ("rwkv_lab", "tests") and len(parts) > 2 else parts[0]


def files() -> list[str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    texts = (name for name in names if name and not name.endswith(".png"))
    return [name for name in texts if name not in EXEMPT and (ROOT / name).is_file()]


def test_words_that_the_glossary_rules_out():
    words, by_folder = ruled_out(), {}
    assert len(words) > 15, "the glossary's tables were not read"
    for name in files():
        for where in found(name, text_of(ROOT / name), words):
            by_folder.setdefault(folder_of(name), []).append(where)
    too_many = {folder: where for folder, where in by_folder.items() if len(where) > ALLOWED.get(folder, 0)}
    lines = [line for folder in too_many for line in too_many[folder]]
    counts = {folder: len(where) for folder, where in sorted(by_folder.items())}
    assert not too_many, "\n".join([*lines, f"{GLOSSARY} has the terms instead. Counted: {counts}"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the judges of it", "judge"),
        ("def check_room(", "room"),
        ("class MergeRoom:", "room"),
        ("it is gone\n    # on from there", "gone on from"),
        ("a turned matrix", "turned"),
        ("LEAVING_OUT = 1", "leaving out"),
        ("by whom it is judged", "judge"),
    ],
)
def test_a_word_is_found(text, word):
    assert list(found("a.py", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text), [word]))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("it turned out", "turned"),
        ("a foreign format", "foreign"),
        ("the classroom", "room"),
        ("slipped", "slip"),
        ("prejudge", "judge"),
    ],
)
def test_plain_english_is_not(text, word):
    assert not list(found("a.py", text, [word]))


AMERICAN = re.compile(
    r"behavior|neighbor|favorite|labeled|modeling|canceled|fulfill|analyz|initializ|quantiz|normaliz|optimiz|recogniz"
    r"|serializ|summariz|organiz|minimiz|maximiz|utiliz|visualiz|generaliz|specializ|synchroniz|materializ|vectoriz",
    re.IGNORECASE,
)
# Names in the interfaces of torch, ONNX, transformers, pillow, bitsandbytes, tokenizers, gguf, the Hub, merge recipes.
THEIRS = re.compile(
    r"(de)?quantize(_\w+)?|quantized|optimize|normaliz(e|er|ers|ed)|Optimizer|is_initialized|(llama_)?synchronize|\w*serialization"
    r"|set_materialize_grads|modeling_\w+|(another_)?normalized_shape|fill_uninitialized_memory|initializer_list"
    r"|GGMLQuantizationType|llama_model_quantize\w*|quantization_version|quantization_config|organization"
    r"|(is_|register_)?initializers?|DynamicQuantizeLinear|optimizer|graph_optimization_level|GraphOptimizationLevel"
    r"|disable_specified_optimizers"
    r"|SerializeToString"
    # Operators of ONNX and calls of TensorRT.
    r"|\w+Normalization|(De)?[qQ]uantizeLinear|(add|create)_optimization_profile|build_serialized_network"
    r"|deserialize_cuda_engine"
    # Options and results of an export, whose names the first design fixed.
    r"|quantization_level|EXPORT_QUANTIZATION_LEVEL|onnx_optimize_graph|EXPORT_ONNX_OPTIMIZE_GRAPH|optimization"
    r"|optimized_size_mb|optimize_onnx_graph"
    r"|(test_)?optimization_processor|OptimizationProcessor|apply_quantization|optimize_model_structure"
)


def test_spelling_is_british():
    found = []
    for name in files():
        text = (ROOT / name).read_text()
        for word in set(re.findall(r"\w+", text)):
            if AMERICAN.search(word) and not THEIRS.fullmatch(word):
                found.append(f"{name}:{text.count(chr(10), 0, text.index(word)) + 1}: {word}")
    assert found == []
