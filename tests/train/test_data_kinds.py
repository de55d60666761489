"""What a data file is, by its bytes: the same under any name, in any encoding, compression and container."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import struct

import numpy as np
import pytest
from tiny_training import SHORT

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.train import Corpus, Examples, TokenCorpus, load_corpus, train
from rwkv_lab.train.batches import in_batches

TEXT = "Grüße aus Köln, 猫は三枚のマットに座った; the cat sat.\n" * 300
RECORDS = [{"text": f'line {i}: ü, 猫, "quoted", a; b'} for i in range(40)]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS).encode()


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


PACK = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


def written(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def learned(examples: Examples) -> set[bytes]:
    return {e.response for e in (*examples.train, *examples.held_out)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv.old", "a.pth", "a.bin"])
def test_text_in_any_encoding_under_any_name(encoding, name, tmp_path):
    latin = "".join(c for c in TEXT if ord(c) < 256)  # without a byte order mark, UTF-16 is told by Latin letters
    bare = encoding in ("utf-16-le", "utf-16-be")
    corpus = load_corpus(written(tmp_path / name, (latin if bare else TEXT).encode(encoding)))
    assert isinstance(corpus, Corpus)
    assert (corpus.train + corpus.held_out).decode() == (latin if bare else TEXT)
    assert corpus.train.decode() and corpus.held_out.decode()  # no character is cut in two
    assert any(encoding[:6] in note for note in corpus.notes) == (not encoding.startswith("utf-8"))


def test_a_mark_of_the_byte_order_alone_marks_it(tmp_path):
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        corpus = load_corpus(written(tmp_path / "a.txt", mark + TEXT.encode(encoding)))
        assert (corpus.train + corpus.held_out).decode() == TEXT


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.gz", "a"])
def test_compressed_records_and_texts(pack, name, tmp_path):
    found = load_corpus(written(tmp_path / name, PACK[pack](LINES)))
    assert learned(found) == {r["text"].encode() for r in RECORDS}
    assert any(pack in note for note in found.notes)
    corpus = load_corpus(written(tmp_path / name, PACK[pack](TEXT.encode("utf-16")))) if name != "a.jsonl" else None
    assert corpus is None or (corpus.train + corpus.held_out).decode() == TEXT


@pytest.mark.parametrize("pack", PACK)
def test_compressed_data_that_end_too_early_are_refused(pack, tmp_path):
    whole = PACK[pack](TEXT.encode() + np.random.default_rng(0).bytes(5000))
    for data in (whole[:-20], whole[: len(whole) // 2], whole[:9] + bytes(len(whole) - 9)):
        with pytest.raises((CorruptFileError, ParameterError), match=f"is broken: {pack} says"):
            load_corpus(written(tmp_path / "a.jsonl", data))


def test_several_members_are_one_text(tmp_path):
    for pack in PACK.values():
        half = len(LINES) // 2
        found = load_corpus(written(tmp_path / "a", pack(LINES[:half]) + pack(LINES[half:])))
        assert len(learned(found)) == len(RECORDS)


@pytest.mark.parametrize(
    "data",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\r\n"),
        b"\n\n" + LINES + b"\n\n",
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS, indent=2).encode("utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a"])
def test_records_under_any_name(data, name, tmp_path):
    found = load_corpus(written(tmp_path / name, data))
    assert learned(found) == {r["text"].encode() for r in RECORDS}


def table(delimiter: str, rows, names=None) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, names or list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.jsonl.old", "a"])
def test_tables_with_named_columns(delimiter, name, tmp_path):
    rows = [{"Question": f'{i}, "+";\n1\t|', "Answer": str(i + 1)} for i in range(30)]
    found = load_corpus(written(tmp_path / name, table(delimiter, rows)))
    assert isinstance(found, Examples) and len(learned(found)) == 30
    first = min((*found.train, *found.held_out), key=lambda e: e.line)
    assert first.text.decode() == 'User: 0, "+";\n1\t|\n\nAssistant: 1\n\n'
    assert first.response == b" 1\n\n" and first.line == 2
    texts = load_corpus(written(tmp_path / name, table(delimiter, RECORDS)))
    assert learned(texts) == {r["text"].encode() for r in RECORDS}


def test_long_cells_and_the_limit_of_the_csv_module(tmp_path):
    before = csv.field_size_limit()
    rows = [{"prompt": str(i), "response": "x" * 200_000} for i in range(3)]
    assert len(load_corpus(written(tmp_path / "a.csv", table(",", rows))).train) + 1 == 3
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"name,age\nAda,36\n" * 1000, "'name', 'age'; none of them is known"),
        (b"prompt,response\na,b\nc\n", "line 3: it has 1 cells, the first line names 2"),
        (b"prompt,response\na,b\nc,d,e\n", "line 3: it has 3 cells"),
        (b'prompt,response\na,b\n"c,d\n', "line 3: this is no row"),
        (b"prompt,response,response\na,b,c\n", "two columns named 'response'"),
        (b"prompt,response,meta\na,b,c\nd,e,\n", "the field 'meta' would not be used"),
        (b"prompt,response\na,\nc,d\n", '1 of 2 records are empty .*no text in "response" .*line 2'),
    ],
)
def test_tables_that_are_not_are_refused(data, words, tmp_path):
    with pytest.raises(ParameterError, match=words):
        load_corpus(written(tmp_path / "a.csv", data))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talks = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i + 1}"}], "id": None}
        for i in range(30)
    ]
    for name in ("a.parquet", "a.txt"):
        parquet.write_table(pa.Table.from_pylist(talks), tmp_path / name)
        found = load_corpus(str(tmp_path / name))
        assert learned(found) == {f" {i + 1}\n\n".encode() for i in range(30)}
        packed = load_corpus(written(tmp_path / "a.gz", gzip.compress((tmp_path / name).read_bytes())))
        assert learned(packed) == learned(found)
    parquet.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ParameterError, match="'a', 'b'; none of them is known"):
        load_corpus(str(tmp_path / "b.parquet"))
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(CorruptFileError, match="broken Parquet"):
        load_corpus(written(tmp_path / "c.parquet", whole[: len(whole) // 2]))
    parquet.write_table(pa.table({"prompt": ["a", "b"], "response": ["x", None]}), tmp_path / "d.parquet")
    with pytest.raises(ParameterError, match='no text in "response" .*row 2'):
        load_corpus(str(tmp_path / "d.parquet"))


def pair(stem, ids: np.ndarray, sizes: list[int]) -> None:
    """A pair as Megatron writes it."""
    code = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4, np.dtype(np.float32): 6}[ids.dtype]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) * ids.dtype.itemsize
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(documents))
    body = np.array(sizes, np.int32).tobytes() + starts.tobytes() + documents.tobytes()
    stem.with_name(stem.name + ".idx").write_bytes(head + body)
    ids.tofile(stem.with_name(stem.name + ".bin"))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_pairs_of_bin_and_idx(dtype, tmp_path, small):
    ids = np.arange(2000, dtype=dtype) % 250
    pair(tmp_path / "d", ids, [100] * 20)
    tokenizer = RWKV_Dual.from_pretrained(small).tokenizer
    for name in ("d", "d.bin", "d.idx"):
        corpus = load_corpus(str(tmp_path / name))
        assert isinstance(corpus, TokenCorpus)
        assert np.array_equal(np.concatenate([corpus.train, corpus.held_out]), ids) and len(corpus.train) == 1800
        tokens, following = in_batches(corpus, tokenizer, 16, 0).draw(50)
        assert ((tokens + 1) % 250 == following).all()
        with pytest.raises(
            ParameterError, match=r"token 200 at position 200, in document 2 is outside .* of 200 tokens"
        ):
            corpus.check(200)
    out = train("lora", tmp_path / "out.pth", str(tmp_path / "d"), small, **SHORT)
    assert out.held_out_bytes == len(tokenizer.decode_bytes(ids[1801:].tolist()))


def test_pairs_that_are_broken_are_refused(tmp_path):
    ids = np.arange(100, dtype=np.uint16)
    pair(tmp_path / "d", ids, [50, 50])
    index, data = (tmp_path / "d.idx").read_bytes(), (tmp_path / "d.bin").read_bytes()
    for change, error, words in (
        ({"d.bin": data[:-2]}, CorruptFileError, "198 bytes; d.idx describes 100 tokens of 2"),
        ({"d.idx": index[:-9]}, CorruptFileError, "d.idx has"),
        ({"d.idx": index[:20]}, CorruptFileError, "inside its header"),
        ({"d.idx": index.replace(b"\0\0\1", b"\0\0\2", 1)}, ParameterError, "version 2"),
        ({"d.idx": index[:17] + b"\6" + index[18:]}, ParameterError, "no tokens"),
        ({"d.idx": index[:34] + struct.pack("<i", 49) + index[38:]}, CorruptFileError, "one after the other"),
    ):
        for name, content in ({"d.bin": data, "d.idx": index} | change).items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=words):
            load_corpus(str(tmp_path / "d"))
    (tmp_path / "d.idx").write_bytes(index)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(ParameterError, match="not beside it"):
        load_corpus(str(tmp_path / "d.idx"))


@pytest.mark.parametrize("shape", [(3000,), (30, 100)])
@pytest.mark.parametrize("name", ["a.npy", "a.txt"])
def test_arrays_of_tokens(shape, name, tmp_path, small):
    ids = (np.arange(3000).reshape(shape) % 257).astype(np.int64)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    corpus = load_corpus(written(tmp_path / name, buffer.getvalue()))
    assert isinstance(corpus, TokenCorpus) and len(corpus.train) == 2700
    assert np.array_equal(np.concatenate([corpus.train, corpus.held_out]), ids.reshape(-1))
    ids.reshape(-1)[1234] = 257
    np.save(tmp_path / "b.npy", ids)
    place = "row 12, column 34" if len(shape) == 2 else "position 1,234"
    with pytest.raises(ParameterError, match=f"b.npy: token 257 at {place} is outside"):
        train("lora", tmp_path / "out.pth", str(tmp_path / "b.npy"), small, **SHORT)
    ids.reshape(-1)[5] = -1
    np.save(tmp_path / "b.npy", ids)
    with pytest.raises(ParameterError, match="token -1 at"):
        load_corpus(str(tmp_path / "b.npy")).check(257)
    assert not (tmp_path / "out.pth").exists()


def test_arrays_that_are_no_tokens_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ParameterError, match="Python objects"):
        load_corpus(str(tmp_path / "a.npy"))
    assert not (tmp_path / "ran").exists()
    for array in (np.zeros(10), np.zeros((2, 2, 2), int), np.array(["a"]), np.array(3)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ParameterError, match="tokens are whole numbers"):
            load_corpus(str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", np.zeros(1000, int))
    whole = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(CorruptFileError, match="broken .npy"):
        load_corpus(written(tmp_path / "a.npy", whole[:-100]))


ZIP = b"PK\x03\x04" + bytes(30_000)
BINARY = {
    "zip": ZIP,
    "a pickle": pickle.dumps(["text"] * 5000, protocol=4),
    "PDF": b"%PDF-1.7\n" + b"x" * 20_000,
    "tar": bytes(257) + b"ustar" + bytes(20_000),
    "SQLite": b"SQLite format 3\0" + bytes(20_000),
    "an Arrow stream": b"\xff\xff\xff\xff" + bytes(20_000),
    "binary of no known kind": b"text\0" * 5000,
    "control characters": b"text\1\2" * 5000,
    "byte 3 is 0xe9": "cafés ".encode("latin1") * 4000,
    "byte 0 is 0x83": "テキスト".encode("shift-jis") * 4000,
    "ends inside a character": ("ü" * 8000).encode()[:-1],
    "compressed twice": gzip.compress(gzip.compress(LINES)),
    "begins as utf-16-le": b"\xff\xfe" + TEXT.encode("utf-16-le") + b"x",
}


@pytest.mark.parametrize("words", BINARY)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_is_refused_by_what_it_is(words, name, tmp_path):
    with pytest.raises(ParameterError, match=words):
        load_corpus(written(tmp_path / name, BINARY[words]))


def test_tokens_without_an_index_say_what_is_lost(tmp_path):
    with pytest.raises(ParameterError, match="a.idx is not beside it"):
        load_corpus(written(tmp_path / "a.bin", np.arange(9000, dtype=np.uint16).tobytes()[200:]))


def test_a_model_is_no_training_text(small):
    with pytest.raises(ParameterError, match="a zip archive"):
        load_corpus(str(small))


@pytest.mark.parametrize("compressed", [False, True])
def test_what_lies_behind_an_array_is_not_lost(tmp_path, compressed):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(50, dtype=np.uint16))
    np.save(buffer, np.arange(70, dtype=np.uint16))
    path = tmp_path / "a.npy"
    path.write_bytes(gzip.compress(buffer.getvalue()) if compressed else buffer.getvalue())
    with pytest.raises(CorruptFileError, match="268 bytes behind its array.*\n.*one array per file"):
        load_corpus(str(path))


@pytest.mark.parametrize("pack", PACK)
def test_what_follows_compressed_data_is_refused(pack, tmp_path):
    packed = PACK[pack](LINES)
    for rest in (b"junk and more", packed[: len(packed) // 2]):
        with pytest.raises(CorruptFileError, match=f"is broken: {pack} says"):
            load_corpus(written(tmp_path / "a", packed + rest))


def test_frames_of_zstd_that_are_to_be_skipped(tmp_path):
    frame = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for data in (frame + zstd(LINES), zstd(LINES) + frame):
        assert len(learned(load_corpus(written(tmp_path / "a", data)))) == len(RECORDS)


@pytest.mark.parametrize("first", ["// a comment", "not JSON", ""])
def test_json_lines_whose_first_line_is_none_are_not_text(first, tmp_path):
    path = written(tmp_path / "a.txt", first.encode() + b"\n" + (LINES + b"\n") * 20)
    if first:
        with pytest.raises(ParameterError, match="line 1: this is no JSON"):
            load_corpus(path)
    else:
        assert len(learned(load_corpus(path))) == len(RECORDS)


def test_objects_in_the_spelling_of_python_are_not_text(tmp_path):
    with pytest.raises(ParameterError, match="line 1: this is no JSON"):
        load_corpus(written(tmp_path / "a.txt", "\n".join(map(repr, RECORDS * 50)).encode()))


def test_first_lines_of_tables_and_of_texts(tmp_path):
    rows = "".join(f"p {i};r {i}\n" for i in range(2000))
    hinted = load_corpus(written(tmp_path / "a.txt", f"sep=;\nprompt;response\n{rows}".encode()))
    assert (hinted.train[0].prompt, hinted.train[0].line) in {(f"p {i}".encode(), i + 3) for i in range(2000)}
    table = "| prompt | response |\n|---|---|\n" + "| p | r |\n" * 2000
    assert load_corpus(written(tmp_path / "a.md", table.encode())).train.decode() == table[: len(table) * 9 // 10]
    with pytest.raises(ParameterError, match="If it is plain text, change its first line"):
        load_corpus(written(tmp_path / "a.txt", ("Text\n" + "one, two\n" * 2000).encode()))


def test_paths_of_data_as_people_give_them(tmp_path, monkeypatch):
    written(tmp_path / "mine.jsonl", LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in ("~/mine.jsonl", tmp_path / "mine.jsonl"):
        assert len(learned(load_corpus(data))) == len(RECORDS)
    for data, words in (
        ("~/mine.json", r"did you mean mine\.jsonl"),
        ("", "is empty"),
        ("hf://x", "download it first"),
    ):
        with pytest.raises(ParameterError, match=words):
            load_corpus(data)
    written(tmp_path / "lone.idx", b"MMIDIDX\0\0")
    for name in ("lone", "lone.bin"):
        with pytest.raises(ParameterError, match=r"There is .*lone\.idx, and no lone\.bin beside it"):
            load_corpus(tmp_path / name)
