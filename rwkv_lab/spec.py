"""Options of a job as one typed model: names, types, ranges, help and defaults, defined once.

A job's keywords, a notebook's parameters and panel, the recipe in the provenance and the reference table in docs/ are
made from its `Spec`, or tested against it. Types are strict: the text "true" is no bool, True is no number, 1.0 is no
whole number. One thing is converted: text that reads as a number, where a `Number` is expected, because
YAML 1.1 takes `1e-3` for text.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from rwkv_lab.errors import ParameterError
from rwkv_lab.paths import path_fault
from rwkv_lab.suggestions import did_you_mean, unknown_name


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value  # refused by its type
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError("it should be a finite number")
    return value


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _path(text: str) -> str:
    fault = path_fault(text)
    if fault:
        raise ValueError(fault)
    return text


@dataclass(frozen=True)
class OneOf:
    """`Annotated[str, OneOf(names)]`: a text that is one of `names()`, which may grow; panels offer them.

    Another text is refused with the names that there are, and the nearest.
    """

    names: Callable[[], Iterable[str]]
    everywhere: bool = True  # False: which there are depends on the machine

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, text: str) -> str:
        names = list(self.names())
        if text not in names:
            raise ValueError(f"it should be one of {', '.join(n or repr(n) for n in names)}{did_you_mean(text, names)}")
        return text


Number = Annotated[float, BeforeValidator(_number)]  # finite
Text = Annotated[str, AfterValidator(_not_empty)]
PathText = Annotated[str, AfterValidator(_path)]
Patterns = list[Text]  # of tensor names, as `rwkv_lab.patterns` reads them
Advise = Callable[[str, str, object], str]


class Spec(BaseModel):
    """Base of all job specs. The order of the fields is their order in signatures, notebooks, panels and tables."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True, arbitrary_types_allowed=True)
    title: ClassVar[str] = ""  # what takes these options, for messages; empty: the class's name

    @classmethod
    def read(cls, values: Mapping[str, Any], advise: Advise | None = None) -> Self:
        """The spec with these values.

        Args:
            advise: what to add to a refusal, from pydantic's type of the error, the option's name and the value.
        Raises:
            ParameterError: an unknown name, a wrong type, or a value out of range; the first in words, the others by
                name.
        """
        for name in values:
            if name not in cls.model_fields:
                raise unknown_name(cls.title or cls.__name__, name, cls.model_fields)
        try:
            return cls(**values)
        except ValidationError as e:
            raise _in_words(e, advise) from None

    def changed(self, **values: Any) -> Self:
        """The same spec with some values changed, validated again.

        Raises:
            ParameterError: as `read`.
        """
        return type(self).read({name: getattr(self, name) for name in type(self).model_fields} | values)

    def given(self) -> dict[str, Any]:
        """The values that are not the defaults, by name."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if field.is_required() or getattr(self, name) != field.get_default(call_default_factory=True)
        }


def _in_words(error: ValidationError, advise: Advise | None) -> ParameterError:
    """The first of pydantic's findings, what to do about it, and which other parameters are wrong too."""
    first, *rest = error.errors()
    name = str(first["loc"][0]) if first["loc"] else ""
    text = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if first["type"] == "too_short":
        text = "it is empty"
    if first["type"] == "missing":
        text = f"{name} is missing"
    elif name:
        value = repr(first["input"])
        text = f"{name}={value if len(value) <= 80 else value[:80] + '…'}: {text}"
    lines = [text]
    advice = advise(first["type"], name, first["input"]) if advise else ""
    if advice:
        lines.append(advice)
    others = sorted({str(e["loc"][0]) for e in rest if e["loc"]} - {name})
    if others:
        lines.append(f"Wrong too: {', '.join(others)}")
    return ParameterError("\n".join(lines))
