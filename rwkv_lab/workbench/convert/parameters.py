"""What convert.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS
from rwkv_lab.convert import ConvertOptions, ConvertSpec, target_names
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.spec import OneOf, Text
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import DEMO, InputPath, Parameters, PathOrEmpty, input_path


@takes(ConvertSpec, ConvertOptions)
class ConvertParameters(Parameters):
    title: ClassVar[str] = "convert"
    basic: ClassVar[tuple[str, ...]] = ("source", "to", "out", "dtype", "tokenizer", "size", "overwrite")

    source: InputPath = "demo:base"
    to: Annotated[str, OneOf(target_names)] = "transformers"
    out: PathOrEmpty = Field("", description="empty: converted… in the report folder, replaced by the next run")
    max_shard_size: str | int = "5GB"
    prompt: Text = Field(
        "In the beginning", description="text that source and output continue, always by the likeliest token"
    )
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/convert")

    @classmethod
    def applies(cls, name: str, values: Mapping[str, Any]) -> bool:
        formats = [f for f in FOREIGN_FORMATS.values() if f.target == values["to"]]
        if name == "max_shard_size":
            return any(CONTAINERS[f.container].is_folder for f in formats)
        return name != "rescale" or any(f.rescales for f in formats)

    def check_files(self) -> None:
        if self.source in DEMO:
            self._spec("demo")
        else:
            open_checkpoint(self._spec(self.source).source).close()

    def spec(self) -> ConvertSpec:
        """What decides the output's bytes; a demo file is trained now if it is meant and not there.

        Raises:
            ParameterError: values that no conversion takes.
        """
        return self._spec(input_path(self.source))

    def _spec(self, source: Any) -> ConvertSpec:
        return ConvertSpec.read(values_for(ConvertSpec, self) | {"source": source})

    def options(self) -> ConvertOptions:
        """How the conversion runs."""
        return ConvertOptions.read(values_for(ConvertOptions, self))


PARAMETERS = ConvertParameters
