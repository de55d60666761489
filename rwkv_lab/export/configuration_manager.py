"""Where the values of an `ExportConfiguration` come from: a YAML file, the environment, keywords.

The last word has the keyword, then the environment, then the file, then the default.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv_lab.arguments import checked
from rwkv_lab.command_line import type_of
from rwkv_lab.errors import ParameterError
from rwkv_lab.export.configuration import ExportConfiguration
from rwkv_lab.paths import to_path
from rwkv_lab.suggestions import did_you_mean, unknown_name
from rwkv_lab.yaml_file import read_mapping

_OWN_NAMES = {"output_directory": "EXPORT_OUTPUT_DIR"}  # of variables that are not made from the option's name


def variable_of(name: str) -> str:
    """The environment variable of an option: EXPORT_ and its name, and EXPORT_ENABLE_… for export_…."""
    if name in _OWN_NAMES:
        return _OWN_NAMES[name]
    short = name.removeprefix("export_")
    return f"EXPORT_{'ENABLE_' if short != name else ''}{short.upper()}"


class ConfigurationManager:
    """Puts a configuration together.

    Args:
        path: a YAML file with `export:` and its groups, or None.
        environment: variables by name; None for those of the process.

    Raises:
        ParameterError: no such file, or a name in it that no option has.
        CorruptFileError: it is not YAML.
    """

    @checked
    def __init__(self, path: str | Path | None = None, environment: Mapping | None = None):
        self.path = None if path is None else to_path(path, "config")
        self._from_file = {} if self.path is None else _options_in(self.path)
        self._from_variables = _options_of(os.environ if environment is None else environment)

    @property
    def stated(self) -> dict[str, str]:
        """What file and environment state: option -> the name of the file or of the variable."""
        return self._gathered({})[1]

    def resolve(self, **keywords: Any) -> ExportConfiguration:
        """The configuration; `keywords` have the last word, `origins` of the result says what came from where.

        Raises:
            ParameterError: an unknown name, a wrong type, or a value out of range; says where the value came from.
        """
        return _read(*self._gathered(keywords))

    def resolve_levels(self, **keywords: Any) -> list[ExportConfiguration]:
        """As `resolve`, a configuration for each level where `quantization_level` has several: a list, or words with
        commas between them. Their folders are told apart by the level, and the first alone writes the PyTorch model.

        Raises:
            ParameterError: as `resolve`.
        """
        values, origins = self._gathered(keywords)
        levels = _several(values.get("quantization_level", "none"))
        if len(levels) == 1:
            given = {"quantization_level": levels[0]} if "quantization_level" in values else {}
            return [_read(values | given, origins)]
        pattern = values.get("naming_pattern", ExportConfiguration.model_fields["naming_pattern"].default)
        if isinstance(pattern, str) and "{quantization_level" not in pattern:
            values["naming_pattern"] = f"{pattern}-{{quantization_level}}"
            origins["naming_pattern"] = f"{origins.get('naming_pattern', 'default')}, and the level"
        found = [_read(values | {"quantization_level": levels[0]}, origins)]
        if found[0].export_onnx and found[0].export_pytorch:
            values["export_pytorch"], origins["export_pytorch"] = False, f"written with level {levels[0]}"
        return found + [_read(values | {"quantization_level": level}, origins) for level in levels[1:]]

    def _gathered(self, keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The values that are given, and where from, by option."""
        values: dict[str, Any] = dict(self._from_file)
        origins = dict.fromkeys(values, self.path.name if self.path else "")
        for name, text in self._from_variables.items():
            values[name], origins[name] = _value_of(name, text), variable_of(name)
        for name, value in keywords.items():
            values[name], origins[name] = value, "argument"
        return values, origins


def _read(values: Mapping[str, Any], origins: Mapping[str, str]) -> ExportConfiguration:
    def advise(kind: str, name: str, value: object) -> str:
        if isinstance(value, list) and name == "quantization_level":
            return "One export has one level; resolve_levels takes several."
        if origins.get(name, "argument") != "argument":
            return f"It comes from {origins[name]}."
        if kind == "missing":
            return f"Give it as a keyword, in the file under export:, or as {variable_of(name)}."
        return ""

    configuration = ExportConfiguration.read(values, advise).coming_from(origins)
    return configuration if configuration.profile == "auto" else configuration.with_profile(configuration.profile)


def _several(level: Any) -> list:
    """Levels that are given as a list or with commas, each once; anything else is one."""
    if isinstance(level, str) and "," in level:
        level = [word.strip() for word in level.strip().removeprefix("[").removesuffix("]").split(",")]
    if isinstance(level, list) and level and all(isinstance(one, str) for one in level):
        return list(dict.fromkeys(level))
    return [level]


def _options_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The texts of variables that are set, by option; one that is nearly such a variable is refused."""
    known = {variable_of(name): name for name in ExportConfiguration.model_fields}
    for variable in environment:
        if isinstance(variable, str) and variable.startswith("EXPORT_") and variable not in known:
            short = {name.removeprefix("EXPORT_"): name for name in known}
            word = variable.removeprefix("EXPORT_")
            own = next((one for one in (word.lower(), variable.lower()) if one in known.values()), None)
            near = did_you_mean(word, short)
            if own or near:
                right = variable_of(own) if own else short[near.split()[-1].rstrip("?")]
                raise ParameterError(f"The environment variable {variable} is not known; did you mean {right}?")
    return {option: environment[name] for name, option in known.items() if environment.get(name, "") != ""}


def _value_of(name: str, text: str) -> Any:
    """The value that the text of a variable stands for."""
    import yaml

    kind = type_of(ExportConfiguration.model_fields[name].annotation)
    if kind is bool and text.strip() in ("0", "1"):
        return text.strip() == "1"
    if kind not in (bool, int, list):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # refused by its type


def _options_in(path: Path) -> dict[str, Any]:
    """The options in a file, by name."""
    groups = ExportConfiguration.GROUPS
    asked = read_mapping(path, "a configuration", f"export: with {', '.join(groups)}")
    _refuse_unknown(path, asked, ["export"], "at its top")
    inside = asked.get("export")
    found: dict[str, Any] = {}
    for group, values in _mapping(path, "export", inside).items():
        if home := next((one for one, names in groups.items() if group in names), None):
            raise ParameterError(f"{path}: {group} stands directly under export:; it belongs under {home}: there.")
        _refuse_unknown(path, [group], list(groups), "under export:")
        for key, value in _mapping(path, group, values).items():
            name = _option(path, group, key)
            if name in found:
                raise ParameterError(f"{path}: {name} is given twice under {group}:, also as {key}.")
            found[name] = value
    return found


def _option(path: Path, group: str, key: Any) -> str:
    """The option that a key of a group stands for; the group's own word may be left out, and so may export_."""
    names = ExportConfiguration.GROUPS[group]
    for full in (key, f"{group}_{key}", f"export_{key}"):
        if full in names:
            return str(full)
    for other, theirs in ExportConfiguration.GROUPS.items():
        if key in theirs:
            raise ParameterError(f"{path}: {key} stands under {group}:; it belongs under {other}:")
    raise unknown_name(f"{path}: {group}:", str(key), names)


def _mapping(path: Path, name: str, found: Any) -> dict:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ParameterError(f"{path}: {name}: must hold names and values, and is {found!r:.80}")
    return found


def _refuse_unknown(path: Path, found: Iterable, known: list[str], where: str) -> None:
    for name in found:
        if name not in known:
            raise ParameterError(
                f"{path}: {name!r} is not known {where}{did_you_mean(str(name), known) or '.'}\n"
                f"Known are: {', '.join(known)}"
            )
