"""Trains from a command line, on one process or many:

    python -m rwkv_lab.train --kind lora --base B.pth --data mine.jsonl --out adapter.pth
    torchrun --nproc-per-node 8 -m rwkv_lab.train --json run.json --device cuda --parallel fsdp

The flags are the parameters of `rwkv_lab.train.train`, which are those of train.ipynb; `--json` names a file with an
object of them, and flags have the last word.
"""

import argparse
import inspect
import json
import logging
import sys
from difflib import get_close_matches
from pathlib import Path

from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.train import demo_base, train
from rwkv_lab.train.processes import started_by_torchrun

_PARAMETERS = {name: p for name, p in inspect.signature(train).parameters.items() if name != "on_step"}


def main(words: list[str] | None = None) -> int:
    """Train as the words say; the exit code, 1 after a refusal."""
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
    parser.add_argument("--json", help="a file with an object of parameters")
    for name, parameter in _PARAMETERS.items():
        flag, kind = f"--{name.replace('_', '-')}", str(parameter.annotation)
        if "bool" in kind:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif "Sequence" in kind:
            parser.add_argument(flag, nargs="+")
        else:
            parser.add_argument(flag, type=int if "int" in kind else float if "float" in kind else str)
    return parser


def _from_json(path: str | None) -> dict:
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ParameterError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(settings, dict):
        raise ParameterError(f"{path} must hold one object of parameters.")
    unknown = next((name for name in settings if name not in _PARAMETERS), None)
    if unknown is not None:
        near = get_close_matches(unknown, _PARAMETERS, n=1)
        raise ParameterError(
            f"{path}: there is no parameter {unknown!r}{f'; did you mean {near[0]}?' if near else '.'}"
        )
    return settings


if __name__ == "__main__":
    sys.exit(main())
