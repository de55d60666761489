"""Arguments against annotations: what `rwkv_lab.arguments.checked` refuses."""

import pytest

from rwkv_lab.arguments import checked
from rwkv_lab.errors import ParameterError


@checked
def joined(texts: list[str]) -> str:
    return "".join(texts)


def test_what_a_list_holds_is_checked_none_too():
    assert joined(["a", "b"]) == "ab"
    for wrong in ([None], ["a", None], [1]):
        with pytest.raises(ParameterError, match="it holds"):
            joined(wrong)
