"""Folders of data: links, files under two names, and files that are meant as data and are broken."""

import gzip
import json

import pytest

from rwkv_lab.errors import CorruptFileError, ParameterError
from rwkv_lab.train.data import load_corpus


def lines(word, count=12):
    return "\n".join(json.dumps({"text": f"{word} {i}"}) for i in range(count))


def texts(found):
    return sorted(e.response.decode() for e in (*found.train, *found.held_out))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines("a"))
    return folder


def test_linked_folders_are_read(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jsonl").write_text(lines("b"))
    (folder / "linked").symlink_to("../other")
    (folder / "around").symlink_to(".")  # must not go round and round
    found = load_corpus(str(folder))
    assert len(texts(found)) == 24 and "a.jsonl, linked/b.jsonl" in found.notes[-1]


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_file_under_two_names_is_read_once(link, folder):
    getattr(folder / "z.jsonl", link)(folder / "a.jsonl")
    found = load_corpus(str(folder))
    assert len(texts(found)) == len({*texts(found)}) == 12
    assert "z.jsonl (the same file as a.jsonl)" in found.notes[0]


def test_broken_data_are_refused_not_skipped(folder):
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("b").encode())[:-9])
    with pytest.raises(CorruptFileError, match=r"b\.jsonl\.gz is broken"):
        load_corpus(str(folder))
    (folder / "b.jsonl.gz").unlink()
    (folder / "b.jsonl").write_bytes('{"text": "ü"}'.encode("latin-1"))
    with pytest.raises(ParameterError, match=r"b\.jsonl is neither text"):
        load_corpus(str(folder))
    (folder / "b.jsonl").rename(folder / "b.dat")  # whose name promises nothing
    assert "b.dat (neither text" in load_corpus(str(folder)).notes[0]


def test_an_empty_file_of_records_is_called_empty(folder):
    (folder / "b.jsonl").write_text("")
    assert "b.jsonl (empty)" in load_corpus(str(folder)).notes[0]


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def walk(path, onerror, **_):
        onerror(PermissionError(13, "Permission denied", str(folder / "closed")))
        return []

    monkeypatch.setattr("rwkv_lab.train.folder.os.walk", walk)
    with pytest.raises(ParameterError, match="closed cannot be read: Permission denied"):
        load_corpus(str(folder))
