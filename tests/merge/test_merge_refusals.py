"""Every hostile input is refused in words, in time, and without a trace."""

import re

import pytest
from hostile import CASES
from models import snapshot

from rwkv_lab import errors, merge, open_checkpoint


def tensor_data(folder) -> list[tuple[str, int, int]]:
    """Where tensors lie in those files of the folder that can be opened: (name of the file, first byte, end)."""
    found = []
    for path in folder.rglob("*"):
        try:
            with open_checkpoint(path) as ck:
                found += [(t.file.path.name, t.offset, t.offset + t.span) for t in ck.info.values()]
        except errors.RwkvLabError:
            pass
    return found


def touches(read, data) -> bool:
    """Whether a read, beyond the 512 bytes that decide a file's format, reaches into a tensor's data."""
    return read[0] == data[0] and max(read[1], data[1]) < min(read[2], data[2]) and read[2] > 512


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_refusals(case, tmp_path, reads):
    given = case.make(tmp_path)
    before, data = snapshot(tmp_path), tensor_data(tmp_path)
    reads.clear()
    with pytest.raises(getattr(errors, case.error)) as caught:
        merge(**given)
    message = str(caught.value)
    assert re.search(case.said, message), message
    assert message.count("\n") < 3 and "Traceback" not in message
    assert snapshot(tmp_path) == before  # inputs as they were, no output, no temporary, no canary
    if case.error != "NumericsError":
        assert [r for r in reads if any(touches(r, d) for d in data)] == []


@pytest.mark.parametrize("case", [c for c in CASES if c.error != "NumericsError"], ids=lambda c: c.id)
def test_a_dry_run_refuses_the_same(case, tmp_path):
    given = case.make(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(getattr(errors, case.error), match=case.said):
        merge(**given, dry_run=True)
    assert snapshot(tmp_path) == before


def test_every_number_of_the_list_is_there():
    accepted = {10, 20, 21}
    assert {c.number for c in CASES} == set(range(1, 26)) - accepted
    assert len({c.id for c in CASES}) == len(CASES)
