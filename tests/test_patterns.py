"""Patterns on tensor names: what one matches, and what is said of one that matches nothing."""

import pytest

from rwkv_lab.errors import ParameterError
from rwkv_lab.patterns import is_selected, matches, refuse_unmatched

NAMES = [f"blocks.{i}.{m}.weight" for i in (0, 1, 10) for m in ("att.key", "att.value", "ffn.key")]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("blocks.1", 3),  # not blocks.10
        ("att.key", 3),
        ("att", 6),
        ("blocks.*.ffn", 3),
        ("blocks.[01].att.key.weight", 2),
        ("*.key.*", 6),
        ("weight", 9),
        ("Att.key", 0),
        ("t.key", 0),
    ],
)
def test_a_pattern_matches_a_whole_name_or_a_run_of_its_parts(pattern, count):
    assert sum(matches(name, pattern) for name in NAMES) == count


def test_exclusion_wins():
    assert is_selected(NAMES[0], None, None) and is_selected(NAMES[0], ["att"], ["ffn"])
    assert not is_selected(NAMES[0], ["att"], ["att.key"]) and not is_selected(NAMES[0], ["ffn"], None)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("att.kye", "att.key"),
        ("att.kee", "att.key"),
        ("ffn.keys", "ffn.key"),
        ("Att.Key", "att.key"),
        ("blocks.99.*.key", "blocks.0.att.key"),
        ("block.10", "blocks.10"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern, near):
    with pytest.raises(ParameterError) as refused:
        refuse_unmatched("targets", ["att.key", pattern], NAMES, "tensors")
    first, second = str(refused.value).split("\n")
    assert first == f"targets: the pattern {pattern!r} matches none of the 9 tensors."
    assert near in second.removeprefix("Did you mean ").removesuffix("?").split(", ")


@pytest.mark.parametrize("pattern", ["q", "lora", "q_proj", "*.q_proj.*", "layers.0.attn", "w", "", "[", "transformer"])
def test_names_that_share_letters_by_chance_are_not_called_near(pattern):
    with pytest.raises(ParameterError, match="There are, for example: blocks.0.att.key.weight, .*, blocks.10.ffn.key"):
        refuse_unmatched("targets", [pattern], NAMES, "tensors")
