"""Text in any encoding of Unicode as UTF-8: with a byte order mark, or by how its bytes are spread."""

import unicodedata
from collections import Counter
from pathlib import Path

from rwkv_lab.errors import ParameterError

BOMS = {  # the longer ones first: that of UTF-32 begins as that of UTF-16
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
_CONTROLS = bytes({*range(32)} - {*b"\b\t\n\v\f\r\x1a\x1b"})  # these stand in no text
_READ = 1 << 16  # bytes that tell the encoding
_ZEROS, _ON_ONE_SIDE = 0.002, 0.7  # share of bytes that are zero, and of these on even or on odd places
_ODD = 0.02  # share of characters that may be of other scripts than the text's own
# Where blocks of Unicode begin, and what counts as one script; "" is used beside any.
_SCRIPTS = (
    (0x0000, ""),  # Latin, digits
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian"),
    (0x0590, "Hebrew"),
    (0x0600, "Arabic"),
    (0x0780, "other"),
    (0x0900, "Devanagari"),
    (0x0980, "Bengali"),
    (0x0A00, "other"),
    (0x0B80, "Tamil"),
    (0x0C00, "other"),
    (0x0E00, "Thai"),
    (0x0E80, "other"),
    (0x10A0, "Georgian"),
    (0x1100, "other"),
    (0x1E00, ""),  # more Latin
    (0x1F00, "Greek"),
    (0x2000, ""),  # punctuation, signs
    (0x2E80, "other"),
    (0x3000, ""),  # punctuation
    (0x3040, "Chinese or Japanese"),
    (0x3100, "other"),
    (0x4E00, "Chinese or Japanese"),
    (0xA000, "other"),
    (0xAC00, "Korean"),
    (0xD7B0, "other"),
    (0xFE30, ""),  # wide forms
    (0xFFF0, "other"),
    (0x1F000, ""),  # pictures
    (0x1FB00, "other"),
)


def as_utf8(path: Path, content: bytes) -> tuple[bytes, str]:
    """(the text in UTF-8 without a byte order mark, the encoding it was in).

    Raises:
        ParameterError: no text in UTF-8, UTF-16 or UTF-32.
    """
    bom, encoding = next(((bom, name) for bom, name in BOMS.items() if content.startswith(bom)), (b"", ""))
    encoding = encoding or _wide_encoding(content[:_READ]) or "utf-8"
    try:
        text = content[len(bom) :].decode(encoding)
    except UnicodeDecodeError as e:
        raise _no_text(path, content, encoding, len(bom) + e.start, e.reason, bool(bom)) from None
    utf8 = content[len(bom) :] if encoding == "utf-8" else text.encode()
    controls = len(utf8) - len(utf8.translate(None, _CONTROLS))
    if b"\0" in utf8 or controls * 1000 > len(utf8):
        raise _without_index(path) or ParameterError(
            f"{path} is binary of no known kind: it has {controls:,} control characters in {len(utf8):,} bytes.\n"
            "Training data are text, JSON lines, CSV, Parquet, or tokens as .npy or .bin and .idx."
        )
    return utf8, encoding


def _no_text(path: Path, content: bytes, encoding: str, at: int, reason: str, marked: bool) -> ParameterError:
    if marked or encoding != "utf-8":
        return ParameterError(f"{path} begins as {encoding}, and byte {at:,} is none; save it as UTF-8.")
    if reason == "unexpected end of data":
        return ParameterError(
            f"{path} ends inside a character, at byte {at:,}: it was cut short.\n"
            f"Copy or download it again, or leave that character out: iconv -c -t utf-8 {path.name} > whole.txt"
        )
    return _without_index(path) or ParameterError(
        f"{path} is neither text in UTF-8 or UTF-16 nor data of a known kind: byte {at:,} is {content[at]:#04x}.\n"
        "If it is text, convert it from the encoding that it is in (latin1, cp1251, gb18030, shift_jis, …):\n"
        f"iconv -f ENCODING -t utf-8 {path.name} > utf8.txt"
    )


def _without_index(path: Path) -> ParameterError | None:
    """What is wrong with binary in a .bin: tokens there need an index."""
    if path.suffix != ".bin":
        return None
    index = path.with_suffix(".idx").name
    return ParameterError(
        f"{path} is binary. Tokens in a .bin are described by an .idx, and {index} is not beside it.\n"
        "Put it there, or save the tokens as .npy."
    )


def _wide_encoding(head: bytes) -> str:
    """UTF-32 or UTF-16 without a mark; "" for anything else, which may be UTF-8.

    Blanks and line ends have zeros there, in every other byte. Without these, pairs of ASCII letters would pass for
    Chinese in UTF-16.
    """
    even, odd = head[0::2].count(0), head[1::2].count(0)
    some, few = len(head) // 6, len(head) // 100
    if odd > some and even <= few:  # mostly Latin: a zero in every other byte
        return "utf-16-le"
    if even > some and odd <= few:
        return "utf-16-be"
    likely: tuple[str, ...] = ()
    if not any(head[3::4]) or not any(head[0::4]):
        likely = ("utf-32-le", "utf-32-be")
    elif even + odd >= _ZEROS * len(head) and max(even, odd) >= _ON_ONE_SIDE * (even + odd):
        likely = ("utf-16-le", "utf-16-be")
    return next((name for name in likely if _is_one_script(_decoded(head, name))), "")


def _decoded(head: bytes, encoding: str) -> str:
    """The text of the beginning of a file, which may end inside a character; "" where it is not in this encoding."""
    for cut in range(4):
        try:
            return head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
    return ""


def _is_one_script(text: str) -> bool:
    """Whether nearly all characters are those of one script, as in what people write; bytes of something else that were
    read so are spread over all."""
    if not text or "\0" in text:
        return False
    found = Counter(map(_script, text))
    own = max((count for script, count in found.items() if script not in ("", "other")), default=0)
    return len(text) - found[""] - own <= _ODD * len(text)


def _script(character: str) -> str:
    if unicodedata.category(character) in ("Cn", "Co") or character < " " and ord(character) in _CONTROLS:
        return "other"
    return next(script for start, script in reversed(_SCRIPTS) if ord(character) >= start)
