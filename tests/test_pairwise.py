"""Cases that are chosen from a product have what they promise."""

from itertools import combinations, product

from pairwise import each, pairwise


def test_every_value_is_there():
    cases = each("abc", range(7), [True])
    assert len(cases) == 7 and [set(column) for column in zip(*cases, strict=True)] == [{*"abc"}, {*range(7)}, {True}]


def test_every_pair_is_there():
    lists = "abc", range(5), [True, False], "xyz"
    cases = pairwise(*lists)
    assert len(cases) < 22 and {*cases} <= {*product(*lists)}
    for i, j in combinations(range(4), 2):
        assert {(case[i], case[j]) for case in cases} == {*product(lists[i], lists[j])}


def test_what_there_is_not_is_not_chosen():
    cases = pairwise("ab", "xy", range(3), where=lambda one, two, three: (one, two) != ("a", "y"))
    assert {case[:2] for case in cases} == {("a", "x"), ("b", "x"), ("b", "y")}
    assert {case[1:] for case in cases} == {*product("xy", range(3))}
