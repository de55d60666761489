"""Verdicts of a run, in words."""

from rwkv_lab.checks import Check


def test_a_check_states_its_numbers_as_tables_do():
    assert str(Check("bits per byte", 3.0644891066047837, 3.3771251080627698, True)) == (
        "PASS  bits per byte: 3.064 (limit 3.377)"
    )
    assert str(Check("bytes", 3186257, 0, False)) == "FAIL  bytes: 3,186,257 (limit 0)"
    assert (
        str(Check("weights in other files", "none", "none", True)) == "PASS  weights in other files: none (limit none)"
    )
