"""Trains from a command line, on one process or many:

    python -m rwkv_lab.train --kind lora --base B.pth --data mine.jsonl --out adapter.pth
    torchrun --nproc-per-node 8 -m rwkv_lab.train --json run.json --device cuda --parallel fsdp

The flags are the options of `TrainSpec` and `TrainOptions`; `--json` names a file with an object of them, and flags
have the last word.
"""

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.spec import unknown_name
from rwkv_lab.train import TrainOptions, TrainSpec, demo_base, train
from rwkv_lab.train.processes import started_by_torchrun

_FIELDS: Mapping[str, FieldInfo] = {
    name: field for name, field in {**TrainSpec.model_fields, **TrainOptions.model_fields}.items() if name != "on_step"
}


def main(words: list[str] | None = None) -> int:
    """Train as the flags state; the exit code, 1 after a refusal."""
    given = vars(_parser().parse_args(words))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = _from_json(given.pop("json")) | {name: v for name, v in given.items() if v is not None}
        missing = [name for name in ("kind", "out") if not settings.get(name)]
        if missing:
            raise ParameterError(f"{' and '.join(missing)} must be given.")
        if settings.get("base") == "demo:base":
            settings["base"] = demo_base()
        with started_by_torchrun(settings.pop("device", "cpu")) as device:
            result = train(**settings, device=device)
    except RwkvLabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    for file in result.outputs:
        print(f"{file.path}  {result.bits_before:.4f} -> {result.bits_after:.4f} bits per byte")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("rwkv_lab.train", description="Train a model, an adapter or a state.")
    parser.add_argument("--json", help="a file with an object of options")
    parser.add_argument("--out", help="the file to write, .pth or .safetensors; for adapters also a folder")
    for name, field in _FIELDS.items():
        flag, kind, words = f"--{name.replace('_', '-')}", _type_of(field.annotation), field.description
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif kind is list:
            parser.add_argument(flag, nargs="+", help=words)
        else:
            parser.add_argument(flag, type=kind if kind in (int, float) else str, help=words)
    return parser


def _type_of(annotation: Any) -> Any:
    """The plain type of an option: `int` for `Annotated[int, …] | None`, `list` for `list[str]`."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _type_of(next(a for a in inside if a is not NoneType))
    return _type_of(inside[0]) if origin is Annotated else origin or annotation


def _from_json(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ParameterError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(settings, dict):
        raise ParameterError(f"{path} must hold one object of options.")
    for name in settings:
        if name not in (*_FIELDS, "out"):
            raise unknown_name(path, name, [*_FIELDS, "out"])
    return settings


if __name__ == "__main__":
    sys.exit(main())
