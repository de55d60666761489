"""Cases for tests with several parameters: a part of their product that has every value, or every pair of values."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any


def each(*lists: Iterable[Any]) -> list[tuple]:
    """As many cases as the longest list has values: each value of each list is in one at least."""
    values = [list(x) for x in lists]
    return [tuple(x[i % len(x)] for x in values) for i in range(max(map(len, values)))]


def pairwise(*lists: Iterable[Any], where: Callable[..., bool] = lambda *case: True) -> list[tuple]:
    """Cases in which each value of a list meets each value of every other one: pairwise testing, found greedily.

    `where` tells which cases there are.
    """
    cases = [case for case in product(*lists) if where(*case)]
    columns = list(combinations(range(len(cases[0])), 2))

    def pairs(case: tuple) -> set[tuple]:
        return {(i, j, str(case[i]), str(case[j])) for i, j in columns}

    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        best = max(cases, key=lambda case: len(missing & pairs(case)))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
