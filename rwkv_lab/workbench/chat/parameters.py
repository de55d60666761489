"""What chat.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from rwkv_lab.analysis.answers import WEIGHTS, read_prompts, refuse_as_adapter
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.tuned_states import state_names
from rwkv_lab.dtypes import in_long
from rwkv_lab.errors import ParameterError
from rwkv_lab.spec import Number, OneOf, Patterns, Text
from rwkv_lab.suggestions import unknown_name
from rwkv_lab.workbench.parameters import (
    DEMO,
    TEXT,
    Files,
    ModelPath,
    Parameters,
    PathOrEmpty,
    TextFileOrEmpty,
    TextOrFile,
    check_models,
)

_Dtype = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(in_long)]
_Weights = Annotated[str, OneOf(lambda: WEIGHTS)]
# Arguments of `generate_stream`, with its defaults; a test compares them.
SETTINGS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
    "sampling",
    "seed",
    "stop",
)


class ChatParameters(Parameters):
    title: ClassVar[str] = "chat"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model", "state", "lora", "pissa", "miss")
    takes_output: ClassVar[str] = "model"
    takes_base: ClassVar[str] = "model"
    purpose: ClassVar[str] = "Let it write, or talk with it"
    basic: ClassVar[tuple[str, ...]] = (
        "model",
        "state",
        "adapter",
        "conversation",
        "prompt",
        "max_new_tokens",
        "temperature",
        "top_p",
        "seed",
        "second",
    )

    model: ModelPath = Field("demo:base", description="a whole model of any generation: .pth, .safetensors, a folder")
    state: Annotated[PathOrEmpty, Files(kinds=("state",))] = Field(
        "", description="a tuned state, from which every text begins"
    )
    adapter: Annotated[PathOrEmpty, Files(kinds=("lora", "pissa", "miss"))] = Field(
        "", description="a LoRA, PiSSA or MiSS adapter of the model, applied in memory"
    )
    conversation: bool = Field(False, description="answer the prompt by the chat template; else continue it as a text")
    prompt: Text = Field("In the beginning", description="what is continued or answered")
    prompts: TextFileOrEmpty = Field(
        "", description="instead: a file, one prompt per line, or JSON with texts or messages"
    )
    max_new_tokens: Annotated[int, Field(ge=0)] = Field(100, description="tokens of an answer, at most")
    temperature: Annotated[Number, Field(ge=0)] = Field(1.0, description="0 always takes the likeliest token")
    top_p: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.9, description="draw from the likeliest tokens that hold this much probability"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(0, description="draw from so many tokens; 0: from all")
    presence_penalty: Number = Field(0.0, description="taken off the logit of every token that was written")
    frequency_penalty: Number = Field(0.0, description="taken off as well, for each time that a token was written")
    penalty_decay: Annotated[Number, Field(ge=0, le=1)] = Field(
        1.0, description="by which counts shrink with every token; 0.996 is common with RWKV"
    )
    sampling: Literal["standard", "rwkv"] = Field(
        "standard", description="order of the steps: standard, or that of the package rwkv"
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(0, description="None: another text each time")
    stop: Patterns = Field([], examples=[["User:"]], description="texts that end what is written")
    template: TextOrFile = Field("world", description="of conversations: world, or the path of a JSON file with one")
    think: bool | None = Field(None, description="of World models that can: think first or not; None: do not say")
    weights: _Weights = Field("none", description="none, or int8, int4 or nf4: the model with rounded weights")
    dtype: _Dtype = Field("float32", description="float32, bfloat16 or float16")
    device: Text = Field("cpu", description="cpu or cuda")
    alpha: Annotated[Number, Field(gt=0)] | None = Field(None, description="of a LoRA whose file does not state it")
    tokenizer: Annotated[str, TEXT] = Field(
        "", description="world, bytes, or the path of a vocabulary or tokenizer.json; empty: by the vocabulary's size"
    )
    second: dict[str, Any] = Field(
        {},
        examples=[{"temperature": 0.3}],
        description="what is different in a second answer: model, state, adapter, weights, temperature, …",
    )
    out: PathOrEmpty = Field("", description="empty: answers.json in the report folder, replaced by the next run")
    overwrite: bool = Field(False, description="replace the output if it is there")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/chat")

    @classmethod
    def parameter_for(cls, kind: str) -> str:
        return kind if kind in ("model", "state") else "adapter"

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        if name in ("template", "think"):
            return bool(values["conversation"] or values["prompts"])
        if name in ("prompt", "conversation"):
            return not values["prompts"]
        return name != "alpha" or bool(values["adapter"])

    def check(self) -> None:
        self.beside()

    def check_files(self) -> None:
        for one in filter(None, (self, self.beside())):
            check_models(one.model)
            for path, refuse in ((one.state, state_names), (one.adapter, refuse_as_adapter)):
                if path and path not in DEMO:
                    with open_checkpoint(path) as ck:
                        refuse(ck)
        if self.prompts:
            read_prompts(self.prompts)

    def beside(self) -> "ChatParameters | None":
        """The parameters of the second answer; None where there is no second one.

        Raises:
            ParameterError: a name or a value that cannot be different there.
        """
        if not self.second:
            return None
        may = ("model", "state", "adapter", "weights", "dtype", "alpha", "template", "think", "tokenizer", *SETTINGS)
        for name in self.second:
            if name not in may:
                raise unknown_name("second", name, may)
        try:
            return type(self).read(self.model_dump() | {"second": {}} | self.second)
        except ParameterError as e:
            raise ParameterError(f"second: {e}") from None

    def settings(self) -> dict[str, Any]:
        """Arguments of `generate_stream`."""
        return {name: getattr(self, name) for name in SETTINGS}


PARAMETERS = ChatParameters
