"""What convert.ipynb takes."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.foreign_format import FOREIGN_FORMATS
from rwkv_lab.convert import ConvertOptions, ConvertSpec, target_names
from rwkv_lab.convert.containers import CONTAINERS
from rwkv_lab.convert.planning import check_source
from rwkv_lab.convert.spec import RepositoryName
from rwkv_lab.spec import OneOf, Text
from rwkv_lab.workbench.options import takes, values_for
from rwkv_lab.workbench.parameters import DEMO, TEXT, InputPath, Parameters, PathOrEmpty, input_path


@takes(ConvertSpec, ConvertOptions)
class ConvertParameters(Parameters):
    title: ClassVar[str] = "convert"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model", "state", "lora", "pissa", "miss")
    takes_output: ClassVar[str] = "source"
    purpose: ClassVar[str] = "Convert it for other programs"
    basic: ClassVar[tuple[str, ...]] = (
        "source",
        "repo_id",
        "file",
        "to",
        "out",
        "dtype",
        "tokenizer",
        "size",
        "overwrite",
    )

    source: InputPath = "demo:base"
    repo_id: RepositoryName = ""
    to: Annotated[str, OneOf(target_names)] = "transformers"
    out: PathOrEmpty = Field("", description="empty: converted… in the report folder, replaced by the next run")
    tokenizer: Annotated[str, TEXT] = ""
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
        if name in ("file", "revision"):
            return bool(values["repo_id"])
        if name in ("model_name", "private", "licence"):
            return bool(values["push_to_hub"])
        return name != "rescale" or any(f.rescales for f in formats)

    def check_files(self) -> None:
        spec = self._spec("demo" if self.source in DEMO else self.source)
        if spec.source is not None and self.source not in DEMO:
            with open_checkpoint(spec.source) as ck:
                check_source(ck, spec)

    def demo_files(self) -> list[str]:
        return [] if self._on_the_hub() else super().demo_files()

    def spec(self) -> ConvertSpec:
        """What decides the output's bytes; a demo file is trained now if it is meant and not there.

        Raises:
            ParameterError: values that no conversion takes.
        """
        return self._spec(self.source if self._on_the_hub() else input_path(self.source))

    def _spec(self, source: Any) -> ConvertSpec:
        return ConvertSpec.read(values_for(ConvertSpec, self) | {"source": None if self._on_the_hub() else source})

    def _on_the_hub(self) -> bool:
        """Whether `repo_id` is the source: it goes before the default of `source`."""
        return bool(self.repo_id) and self.source == type(self).model_fields["source"].default

    def options(self) -> ConvertOptions:
        """How the conversion runs."""
        return ConvertOptions.read(values_for(ConvertOptions, self))


PARAMETERS = ConvertParameters
