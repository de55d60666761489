"""Trains from a command line, on one process or many:

    python -m rwkv_lab.train --kind lora --base B.pth --data mine.jsonl --out adapter.pth
    torchrun --nproc-per-node 8 -m rwkv_lab.train --json run.json --device cuda --parallel fsdp

The flags are the options of `TrainSpec` and `TrainOptions`; `--json` names a file with an object of them, and flags
have the last word.
"""

import argparse
import logging
import sys
from collections.abc import Mapping

from pydantic.fields import FieldInfo

from rwkv_lab.command_line import add_flags, settings_of
from rwkv_lab.errors import RwkvLabError
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
        settings = settings_of(given, ("kind", "out"), [*_FIELDS, "out"])
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
    parser.add_argument("--out", help="the file to write, .pth or .safetensors; for adapters also a folder")
    add_flags(parser, _FIELDS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
