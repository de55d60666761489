"""Parameters of a notebook from the specs of its job: what an option is called, may be, means and defaults to is
stated there alone.

papermill passes words, so paths are text here, and "" or [] is used where a spec has None.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from rwkv_lab.spec import Spec
from rwkv_lab.workbench.parameters import Parameters, PathOrEmpty

P = TypeVar("P", bound=Parameters)
S = TypeVar("S", bound=Spec)


def takes(*specs: type[Spec], without: Collection[str] = ()) -> Callable[[type[P]], type[P]]:
    """Class decorator: add a parameter for each option of the specs.

    A field of the class replaces the option of its name, and takes its help where it states none. The order
    is that of `basic`, then of the specs, then of the class.

    Args:
        without: options that the notebook sets itself.
    """

    def decorate(model: type[P]) -> type[P]:
        options = {n: field for spec in specs for n, field in spec.model_fields.items() if n not in without}
        for name, field in model.model_fields.items():
            field.description = field.description or options[name].description
        fields = {n: _in_words(field) for n, field in options.items()} | {
            n: (_annotation(field), field) for n, field in model.model_fields.items()
        }
        order = [*model.basic, *(n for n in fields if n not in model.basic)]
        # Fields are ordered as the furthest base has them; values come from the nearest.
        ordered: Any = create_model("Ordered", __base__=Parameters, **{n: fields[n] for n in order})  # type: ignore
        made: Any = create_model(
            model.__name__, __base__=(model, ordered), __module__=model.__module__, __doc__=model.__doc__
        )
        return made

    return decorate


def unset(spec: type[Spec], several: Mapping[str, list]) -> type[Spec]:
    """A spec whose options are all None at first: not given, so that something else decides.

    Args:
        several: options of which a list is taken, with an example.
    """
    fields: Any = {}
    for name, option in spec.model_fields.items():
        annotation, examples = _annotation(option), option.examples
        if name in several:
            annotation, examples = list[annotation], [several[name]]
        fields[name] = annotation | None, Field(None, description=option.description, examples=examples)
    return create_model(f"Unset{spec.__name__}", __base__=Spec, **fields)


def values_for(spec: type[Spec], parameters: Parameters) -> dict[str, Any]:
    """The values of the spec's options among the parameters, with None again where none is given."""
    values = {name: getattr(parameters, name) for name in spec.model_fields if name in type(parameters).model_fields}
    return {n: None if v in ("", []) and spec.model_fields[n].default is None else v for n, v in values.items()}


def _in_words(option: FieldInfo) -> tuple[Any, FieldInfo]:
    """(type, field) of the parameter for an option."""
    kinds = [kind for kind in _alternatives(option.annotation) if kind is not NoneType]
    kind, default = kinds[0], option.get_default(call_default_factory=True)
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    annotation = _annotation(option)
    if plain is Path:
        annotation, default = PathOrEmpty, "" if default is None else default
    elif _may_be_none(option) and get_origin(kind) is list:  # one that is checked further may not be empty
        annotation, default = kind, []
    elif _may_be_none(option) and get_origin(plain) is Literal:
        annotation, default = Literal[("", *get_args(plain))], ""
        annotation = Annotated[annotation, *option.metadata] if option.metadata else annotation
    field: Any = Field(default, description=option.description, examples=option.examples)
    return annotation, field


def _annotation(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _may_be_none(field: FieldInfo) -> bool:
    return NoneType in _alternatives(field.annotation)
