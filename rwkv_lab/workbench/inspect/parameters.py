"""What inspect.ipynb takes."""

from typing import ClassVar

from pydantic import Field

from rwkv_lab.workbench.parameters import InputPath, Parameters, PathOrEmpty, check_headers


class InspectParameters(Parameters):
    title: ClassVar[str] = "inspect"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model", "state", "lora", "pissa", "miss")
    takes_output: ClassVar[str] = "checkpoint"
    purpose: ClassVar[str] = "See what is in it"
    basic: ClassVar[tuple[str, ...]] = ("checkpoint",)

    checkpoint: InputPath = Field("demo:base", description="any checkpoint: .pth, .safetensors, a folder, an adapter")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/inspect")

    def check_files(self) -> None:
        check_headers(self.checkpoint)


PARAMETERS = InspectParameters
