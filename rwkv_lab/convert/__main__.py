"""Converts from a command line:

    python -m rwkv_lab.convert --source B.pth --to fla --out folder
    python -m rwkv_lab.convert --repo-id owner/name --file B.pth --to gguf --out B.gguf

The flags are the options of `ConvertSpec` and `ConvertOptions`; `--json` names a file with an object of them, and flags
have the last word.
"""

import argparse
import logging
import sys

from rwkv_lab.command_line import add_flags, settings_of
from rwkv_lab.convert import ConvertOptions, ConvertSpec, convert
from rwkv_lab.convert.hub import TRANSPORTS
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.sigterm import sigterm_cleans_up

_FIELDS = {**ConvertSpec.model_fields, **ConvertOptions.model_fields}


def main(words: list[str] | None = None) -> int:
    """Convert as the flags state; the exit code: 1 after a refusal, or where a check fails."""
    parser = argparse.ArgumentParser("rwkv_lab.convert", description="Write a checkpoint in another format.")
    parser.add_argument("--out", help="the folder or file to write")
    add_flags(parser, _FIELDS)
    given = vars(parser.parse_args(words))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in TRANSPORTS:  # they log every request with its address, which may be signed
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with sigterm_cleans_up():
            result = convert(**settings_of(given, ("to", "out"), [*_FIELDS, "out"]))
    except RwkvLabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    print(result.plan)
    for dropped in result.dropped:
        print(f"dropped {dropped.name}: {dropped.why}")
    for line in (*result.notes, *result.checks):
        print(line)
    return 0 if all(check.passed for check in result.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
