"""What merge.ipynb takes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.errors import LayoutError, ParameterError, RwkvLabError
from rwkv_lab.merge import MERGE_METHODS, MergeOptions, MergeSpec, check_files, read_recipe
from rwkv_lab.merge.families import family_of, method_of
from rwkv_lab.merge.method import OF_SOME_METHODS, Method
from rwkv_lab.spec import Number, Text
from rwkv_lab.train import CORPORA
from rwkv_lab.train.data import check_data
from rwkv_lab.train.demo_paths import demo_file
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import (
    DEMO,
    FINE_TUNE,
    Files,
    InputsOrEmpty,
    ModelPath,
    PathOrEmpty,
    ReadsText,
    TextFileOrEmpty,
    WeightedPaths,
    input_path,
)

Setting = Number | dict[str, Any]  # or one that differs by tensor: a mapping of patterns to numbers
_BOTH = "Give both, or neither for the demo."
_IN_RECIPES = ("base", "tuned", "method", "alpha", "weights", "pissa_init", "parameters", "dtype")


@takes(MergeSpec, MergeOptions)
class MergeParameters(ReadsText):
    title: ClassVar[str] = "merge"
    takes_kinds: ClassVar[tuple[str, ...]] = ("state", "lora", "pissa", "miss", FINE_TUNE)
    takes_output: ClassVar[str] = "tuned"
    purpose: ClassVar[str] = "Merge it into its base"
    basic: ClassVar[tuple[str, ...]] = (
        "base",
        "tuned",
        "out",
        "method",
        "alpha",
        "weights",
        "parameters",
        "data",
        "overwrite",
    )

    base: ModelPath = "demo:base"
    tuned: WeightedPaths = "demo:state"
    out: PathOrEmpty = Field("", description="empty: merged.pth in the report folder, replaced by the next run")
    alpha: Number | dict[str, Any] | list[Number | None] | None = None
    weights: list[Setting] | dict[str, Any] = Field([], examples=[[0.5, 0.5]])
    pissa_init: InputsOrEmpty = ""
    parameters: dict[str, Any] = Field({}, examples=[{"density": 0.3}])
    data: Annotated[list[Text], Files(several=True, checkpoints=False)] = Field(
        list(CORPORA),
        examples=[["mine.txt"]],
        description="text that models read and continue: english, python, or paths as in train",
    )
    recipe: TextFileOrEmpty = Field(
        "", description="a mergekit recipe (YAML), in place of files, method and its options"
    )
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/merge")

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        if values["recipe"]:
            return name not in _IN_RECIPES
        method = MERGE_METHODS.get(values["method"])
        return method is None or name not in OF_SOME_METHODS or name in method.takes

    @classmethod
    def stands_for(cls, values: Mapping[str, Any]) -> Mapping[str, object]:
        if values["recipe"]:
            return {}
        method = MERGE_METHODS.get(values["method"]) or _method_of_file(values["tuned"])
        own = {p.name: p.default for p in method.parameters} if method else {}
        found = {name: f"{own[name]:g}" for name in ("alpha", "weights") if isinstance(own.get(name), int | float)}
        if method and "alpha" in method.takes and own["alpha"] is None:  # of adapters
            found["alpha"] = "what the file states"
        return found

    @classmethod
    def weighted(cls, values: Mapping[str, Any]) -> Sequence[str]:
        if not cls.applies("weights", values):
            return ()
        method = MERGE_METHODS.get(values["method"])
        own = [p for p in method.parameters if p.name == "weights"] if method else []
        base = [values["base"]] if own and own[0].takes.each == "model" else []
        tuned = values["tuned"]
        return [*base, *(tuned if isinstance(tuned, list) else [tuned])]

    def check(self) -> None:
        if self.recipe:
            for name in _IN_RECIPES:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ParameterError(f"{name}={getattr(self, name)!r}: the recipe states it; leave one of them out")
        elif self.tuned in DEMO and self.base not in DEMO:
            raise ParameterError(f"tuned is missing: base is {self.base}, tuned is still the demo's.\n{_BOTH}")

    def check_files(self) -> None:
        if self.recipe:
            check_files(read_recipe(self.recipe))
        elif self.tuned not in DEMO:
            self._check_tuned()
        else:
            spec = self._spec("demo", "demo")
            spec = spec.changed(method="state") if spec.method == "auto" else spec  # the demo's tuned file is a state
            family_of(spec.method).check(spec)
        for data in self.data:
            check_data(data)

    def _check_tuned(self) -> None:
        """Refuse files that do not go with the base, which may be the demo model that they were trained on."""
        if self.base not in DEMO:
            return check_files(self._spec(self.base, self.tuned))
        demo, why = demo_file("base"), "It is not there yet."
        try:
            if demo.exists():
                return check_files(self._spec(demo, self.tuned))
        except LayoutError as e:
            why = str(e).splitlines()[0]
        raise ParameterError(f"base is missing: tuned is {self.tuned}, base is still the demo's.\n{why}\n{_BOTH}")

    def demo_files(self) -> list[str]:
        return [] if self.recipe else super().demo_files()

    def spec(self) -> MergeSpec:
        """What decides the output's bytes; the demo files are trained now if they are meant and not there.

        Raises:
            RwkvLabError: of the recipe, or values that no merge takes.
        """
        if self.recipe:
            also = {n: v for n, v in values_for(MergeSpec, self).items() if n not in _IN_RECIPES}
            return read_recipe(self.recipe).changed(**also)
        tuned = self.tuned if isinstance(self.tuned, list) else [self.tuned]
        return self._spec(input_path(self.base), [input_path(path) for path in tuned])

    def _spec(self, base: Any, tuned: Any) -> MergeSpec:
        starts = self.pissa_init
        # Of several adapters, those that did not start from a PiSSA have an empty place in the list.
        init = [path or None for path in starts] if isinstance(starts, list) else starts or None
        given = values_for(MergeSpec, self) | {"pissa_init": init}
        return MergeSpec.read(given | {"base": base, "tuned": tuned})

    def options(self) -> MergeOptions:
        """How the merge runs."""
        return MergeOptions.read(values_for(MergeOptions, self))


def _method_of_file(tuned: Any) -> Method | None:
    """The method that auto stands for with one file, as far as its header tells."""
    if isinstance(tuned, list):  # several files
        return None
    if tuned in DEMO:
        return MERGE_METHODS["state"]
    try:
        with open_checkpoint(tuned) as ck:
            return MERGE_METHODS[method_of(ck)]
    except (RwkvLabError, OSError):  # the message beside the fields says so
        return None


PARAMETERS = MergeParameters
