"""What export.ipynb takes: a configuration in YAML, and every option of it, which then has the last word.

An option that is None comes from the YAML file, a variable EXPORT_… of the environment, or is the default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.export.configuration_manager import ConfigurationManager
from rwkv_lab.spec import Text
from rwkv_lab.train.demo_paths import demo_file
from rwkv_lab.workbench.options import takes, unset
from rwkv_lab.workbench.parameters import (
    DEMO,
    MODEL,
    InputPath,
    Parameters,
    PathOrEmpty,
    TextFileOrEmpty,
    check_headers,
)

_DEMO = {"checkpoint_path": "demo:state", "base_model_name": "demo:base"}
_LEVELS = ["none", "int8"]  # of the demo
_IN_REPORT = {"naming_pattern": "{model_name}-{quantization_level}", "overwrite": True}


@takes(unset(ExportConfiguration, {"quantization_level": _LEVELS}))
class ExportParameters(Parameters):
    title: ClassVar[str] = "export"
    takes_kinds: ClassVar[tuple[str, ...]] = ("model", "state", "lora", "pissa", "miss")
    takes_output: ClassVar[str] = "checkpoint_path"
    takes_base: ClassVar[str] = "base_model_name"
    purpose: ClassVar[str] = "Export it for PyTorch and onnxruntime"
    basic: ClassVar[tuple[str, ...]] = (
        "config",
        "checkpoint_path",
        "base_model_name",
        "quantization_level",
        "export_pytorch",
        "export_onnx",
        "output_directory",
        "model_name",
    )

    config: TextFileOrEmpty = Field("", description="a YAML file with export: and its groups; empty: none")
    checkpoint_path: InputPath | None = Field(
        None, description="an adapter, tuned state or model, or a folder of checkpoints; None everywhere: the demo"
    )
    base_model_name: Annotated[str, MODEL] | None = None
    output_directory: PathOrEmpty | None = Field(
        None, description="where the exports go; None everywhere: exported in the report folder, replaced each time"
    )
    prompt: Text = Field(
        "In the beginning", description="text that the exported models continue by the likeliest token"
    )
    dry_run: bool = Field(False, description="stop after the plan")
    report: PathOrEmpty = Field("", description="folder of this run's report; empty: reports/export")

    @classmethod
    def stands_for(cls, values: Mapping[str, Any]) -> Mapping[str, object]:
        try:
            first, *others = cls.read(values).configurations()
        except RwkvLabError:
            return {}
        origins = first.origins
        values = {name: getattr(first, name) for name in ExportConfiguration.model_fields}
        words = {_demo_path(word): word for word in DEMO}
        found = {n: f"{words.get(str(v), v)!s} ({origins[n]})" for n, v in values.items() if v not in (None, "")}
        levels = ", ".join(one.quantization_level for one in (first, *others))
        return found | {"quantization_level": f"{levels} ({origins['quantization_level']})"}

    def check_files(self) -> None:
        first, *_ = self.configurations()
        path = Path(first.checkpoint_path)
        is_demo = str(path) in map(_demo_path, DEMO)
        if not (path.is_dir() or is_demo):  # a folder may hold many; which one is taken is found later
            check_headers(str(path), dense_for="An export")

    def demo_files(self) -> list[str]:
        return list(_DEMO.values()) if self._is_demo(self._manager()) else super().demo_files()

    def configurations(self) -> list[ExportConfiguration]:
        """One for each level, with all values and where they come from; demo files are named, and need not be there.

        Raises:
            ParameterError: a wrong value, an unknown name in the file, or a checkpoint without a path.
        """
        manager = self._manager()
        fields = type(self).model_fields
        given = {n: v for n in ExportConfiguration.model_fields if (v := getattr(self, n)) != fields[n].default}
        origins = dict.fromkeys(given, "parameter")
        own = self._own(manager, given)
        found = manager.resolve_levels(**{n: _demo_path(v) for n, v in (given | own).items()})
        return [one.from_where(origins | dict.fromkeys(own, "notebook")) for one in found]

    def _own(self, manager: ConfigurationManager, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the notebook sets where it is not stated: the demo's files, and an output beside the report."""
        stated = {**manager.stated, **given}
        own: dict[str, Any] = {}
        if self._is_demo(manager):
            own = {**_DEMO, "quantization_level": _LEVELS}
        if "output_directory" not in stated:
            own |= {"output_directory": str(Path(self.report or ".") / "exported")} | _IN_REPORT
        return {name: value for name, value in own.items() if name not in stated}

    def _manager(self) -> ConfigurationManager:
        return ConfigurationManager(self.config or None)

    def _is_demo(self, manager: ConfigurationManager) -> bool:
        """Whether nothing states a checkpoint, nor a base."""
        stated = manager.stated
        if self.checkpoint_path or "checkpoint_path" in stated:
            return False
        if self.base_model_name or "base_model_name" in stated:
            raise ParameterError(
                "checkpoint_path is missing: a base is given, and the checkpoint is still the demo's.\n"
                "Give both, or neither for the demo."
            )
        return True


def _demo_path(value: Any) -> Any:
    """The path of a demo file, which need not be there, for its name; others as they are."""
    return str(demo_file(value.removeprefix("demo:"))) if isinstance(value, str) and value in DEMO else value


PARAMETERS = ExportParameters
