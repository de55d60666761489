"""A tokenizer.json like GPT-NeoX's 20B, small: byte-level BPE, the end of text, runs of blanks as tokens."""

import json
from pathlib import Path

END = "<|endoftext|>"
BLANKS = ["    ", "  "]


def write_bpe(path: Path, texts: list[str], size: int = 400, digits: bool = False, nfc: bool = False, **changed) -> int:
    """Write one that was trained on the texts.

    Args:
        digits: cut numbers into digits first.
        nfc: compose letters and marks first.
        changed: entries of the file, or of its "model", that are replaced.
    Returns:
        How many tokens it has.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([first, words]) if digits else words
    library.decoder = decoders.ByteLevel()
    if nfc:
        library.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(texts, trainer)
    library.add_tokens([AddedToken(blanks, normalized=True) for blanks in BLANKS])
    content = json.loads(library.to_str())
    for name, value in changed.items():
        (content if name in content else content["model"])[name] = value
    path.write_text(json.dumps(content))
    return library.get_vocab_size()
