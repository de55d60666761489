"""What train.ipynb takes: the options of `train`, and what only the notebook has."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.errors import RwkvLabError
from rwkv_lab.train import KINDS, TrainOptions, TrainSpec
from rwkv_lab.train.data import check_data
from rwkv_lab.train.spec import OF_FRESH_MODELS
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import (
    DEMO,
    TEXT,
    Files,
    ModelOrEmpty,
    Parameters,
    PathOrEmpty,
    TextOrFile,
    check_headers,
    check_models,
    input_path,
)


# The notebook keeps the log in the report folder and shows samples and loss itself; it runs in one process.
@takes(TrainSpec, TrainOptions, without=("log_folder", "samples", "on_step", "parallel"))
class TrainParameters(Parameters):
    title: ClassVar[str] = "train"
    basic: ClassVar[tuple[str, ...]] = (
        "kind",
        "base",
        "data",
        "preset",
        "out",
        "steps",
        "ctx_len",
        "lr",
        "rank",
        "alpha",
        "overwrite",
    )

    base: ModelOrEmpty = "demo:base"
    start: Annotated[PathOrEmpty, Files(kinds=("state", "lora", "pissa", "miss"))] = ""
    data: TextOrFile = "python"
    tokenizer: Annotated[str, TEXT] = ""
    template: TextOrFile = "world"
    out: PathOrEmpty = Field("", description="empty: trained.pth in the report folder, replaced by the next run")
    compare: bool = Field(False, description="then compare all methods at equal parameters: a minute more")
    dry_run: bool = Field(False, description="stop after the plan")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/train")

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        return TrainSpec.applies(name, values["kind"]) and not (name in OF_FRESH_MODELS and values["base"])

    @classmethod
    def stands_for(cls, values: Mapping[str, Any]) -> Mapping[str, object]:
        kind = KINDS.get(values["kind"])
        if kind is None:
            return {}
        own = {name: getattr(kind.defaults, name) for name in ("steps", "batch_size", "ctx_len", "lr", "rank")}
        own |= _of_preset(values)
        own |= {"long": "cut", "autocast": values.get("dtype")}
        rank, steps = values.get("rank") or own["rank"], values.get("steps") or own["steps"]
        numbers = isinstance(rank, int) and isinstance(steps, int)  # a field may hold other text
        return own | ({"alpha": 2 * rank, "warmup": max(1, round(0.05 * steps))} if numbers else {})

    def check(self) -> None:
        self._spec(self.base, self.start)

    def check_files(self) -> None:
        check_models(self.base)
        check_headers(self.base, dense_for="Training")
        check_headers(self.start)
        check_data(self.data)

    def _spec(self, base: str, start: str) -> TrainSpec:
        # papermill makes an int of `-p lr 1`; what a notebook trains records numbers with a fraction, as it always did.
        fractions = {n: float(v) for n in ("lr", "alpha") if (v := getattr(self, n)) is not None}
        return TrainSpec.read(values_for(TrainSpec, self) | fractions | {"base": base, "start": start})

    def spec(self) -> TrainSpec:
        """What decides the result; the demo model is trained now if it is meant and not there.

        Raises:
            ParameterError: values that do not go together.
        """
        base, start = (str(input_path(file)) if file else "" for file in (self.base, self.start))
        return self._spec(base, start)

    def options(self) -> TrainOptions:
        """How the training runs."""
        return TrainOptions.read(values_for(TrainOptions, self))


def _of_preset(values: Mapping[str, Any]) -> Mapping[str, object]:
    """What the preset sets beside these values, not yet validated; nothing while they are refused."""
    of_size = {name: values[name] for name in ("kind", "base", "preset", *OF_FRESH_MODELS) if name in values}
    if values["base"] in DEMO:
        return {}  # smaller than what presets are for
    try:
        return TrainSpec.read(of_size).preset_settings()[1]
    except RwkvLabError:
        return {}


PARAMETERS = TrainParameters
