"""Values that differ from tensor to tensor: by pattern on its name, or along the layers.

A setting is a number (or True, False), or one of these, which may stand inside each other:

    {"blocks.*.att": 0.3, "*.ffn.key.*": 0.5}   the first pattern that matches a tensor decides, else the default
    {"gradient": [0, 0.5, 1]}                   points spread evenly over the layers, straight lines between them
    [0.2, {"gradient": [0, 1]}]                 one setting per model

Patterns are those of `rwkv_lab.patterns`: `blocks.*.att` matches `blocks.3.att.key.weight`.
"""

from collections.abc import Iterable, Mapping

from rwkv_lab.errors import ParameterError
from rwkv_lab.merge.method_parameters import LARGEST
from rwkv_lab.names import split_block
from rwkv_lab.patterns import matches, refuse_unmatched

GRADIENT, REST = "gradient", "*"


def value_for(setting: object, name: str, n_layer: int) -> object:
    """What a setting comes to for the tensor `name`; None where none of its patterns matches."""
    if isinstance(setting, Mapping):
        if set(setting) == {GRADIENT}:
            return _along(setting[GRADIENT], depth(name, n_layer))
        inner = next((s for pattern, s in setting.items() if matches(name, pattern)), None)
        return value_for(inner, name, n_layer)
    if isinstance(setting, (list, tuple)):
        return [value_for(s, name, n_layer) for s in setting]
    return setting


def with_default(setting: object, default: object) -> object:
    """The setting with `default` for the tensors that none of its patterns matches, written out."""
    if isinstance(setting, (list, tuple)):
        return [with_default(s, default) for s in setting]
    if not isinstance(setting, Mapping) or GRADIENT in setting:
        return setting
    inner = {pattern: with_default(s, default) for pattern, s in setting.items()}
    return inner if REST in inner else inner | {REST: default}


def depth(name: str, n_layer: int) -> float:
    """0 in the first layer to 1 in the last; 0 outside the layers, and 1 where there is only one."""
    inside = split_block(name)
    if not inside:
        return 0.0
    return inside[0] / (n_layer - 1) if n_layer > 1 else 1.0


def check_setting(what: str, setting: object, names: Iterable[str]) -> None:
    """Refuse patterns that match no tensor, and gradients that are no list of numbers.

    Raises:
        ParameterError: with the nearest names.
    """
    names = list(names)
    if isinstance(setting, (list, tuple)):
        for inner in setting:
            check_setting(what, inner, names)
    if not isinstance(setting, Mapping):
        return
    if GRADIENT in setting:
        points = setting[GRADIENT]
        points = points if isinstance(points, (list, tuple)) else []
        numbers = all(type(p) in (int, float) and abs(p) <= LARGEST for p in points)
        if len(setting) > 1 or not numbers or not points:
            raise ParameterError(f"{what}={setting!r}: a gradient is a list of numbers of float32, and stands alone")
        return
    for pattern, inner in setting.items():
        if not isinstance(pattern, str):
            raise ParameterError(f"{what} has the pattern {pattern!r}; a pattern is a text such as 'blocks.*.att'")
        refuse_unmatched(what, [pattern], names, "tensors that are mixed")
        check_setting(what, inner, names)


def _along(points: list[float], where: float) -> float:
    place = where * (len(points) - 1)
    i = min(int(place), len(points) - 1)
    after = points[min(i + 1, len(points) - 1)]
    return (1 - (place - i)) * points[i] + (place - i) * after
