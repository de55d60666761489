"""What peft.ipynb takes."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.analysis.tuning import TuningOptions, check_tuning, open_tuning
from rwkv_lab.errors import ParameterError
from rwkv_lab.spec import Number, Patterns
from rwkv_lab.train.data import check_data
from rwkv_lab.workbench.options import takes
from rwkv_lab.workbench.parameters import (
    DEMO,
    FINE_TUNE,
    InputOrEmpty,
    InputPath,
    InputsOrEmpty,
    ModelPath,
    PathOrEmpty,
    ReadsText,
    TextOrFile,
)


@takes()
class PeftParameters(ReadsText):
    title: ClassVar[str] = "peft"
    takes_kinds: ClassVar[tuple[str, ...]] = ("state", "lora", "pissa", "miss", FINE_TUNE)
    takes_output: ClassVar[str] = "adapter"
    purpose: ClassVar[str] = "Look into what the tuning changed"
    basic: ClassVar[tuple[str, ...]] = ("base", "adapter", "second", "rank", "data")

    base: ModelPath = Field("demo:base", description="the model that was tuned: .pth, .safetensors or a folder")
    adapter: InputPath = Field("demo:state", description="what was trained on it: an adapter, a state, a fine-tune")
    second: InputOrEmpty = Field("", description="another tuning of the same base: do the two pull the same way?")
    targets: Patterns = Field(
        [],
        examples=[["att.key", "ffn.key"]],
        description="what is measured: names or ends such as att.key, or patterns; empty: all",
    )
    rank: Annotated[int, Field(ge=1)] = Field(8, description="how much of each change would a LoRA of this rank keep?")
    data: TextOrFile = Field("python", description="held-out text that is read: english, python, or a path as in train")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(None, description="of a LoRA whose file does not state it")
    pissa_init: InputsOrEmpty = Field(
        "", description="of PiSSA: file or folder that it started from; a list of two: second's, too"
    )
    parameters: dict[str, Any] = Field(
        {},
        examples=[{"use_rslora": True}],
        description="what else files may not state: use_rslora, bat, residual_base, quant; each may be a list of two",
    )
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/peft")

    def tuning_options(self, which: int) -> TuningOptions:
        """Options of the adapter (0) or of the second one (1). One value is the adapter's, a list has one for each."""
        given = {"pissa_init": self.pissa_init, **self.parameters}
        pairs = {n: v if isinstance(v, list) else [v, None] for n, v in given.items()}
        odd = next((n for n, v in pairs.items() if len(v) != 2), None)
        if odd:
            raise ParameterError(f"{odd}={pairs[odd]!r}: one value is needed, or a list of two")
        own = {n: v[which] for n, v in pairs.items() if v[which] is not None}
        return TuningOptions(None if which else self.alpha, own.pop("pissa_init", None) or None, own)

    def check(self) -> None:
        if self.adapter in DEMO and self.base not in DEMO:
            raise ParameterError(f"adapter is missing: base is {self.base}, adapter is still the demo's.")

    def check_files(self) -> None:
        for which, path in enumerate((self.adapter, self.second)):
            if not path or path in DEMO:
                continue
            if self.base in DEMO:
                check_tuning(path, self.tuning_options(which), direction_only=which == 1)
            else:
                with open_tuning(self.base, path, self.tuning_options(which), direction_only=which == 1):
                    pass
        check_data(self.data)


PARAMETERS = PeftParameters
