"""Exports from a command line:

    python -m rwkv_lab.export --config export.yaml
    python -m rwkv_lab.export --config export.yaml --output-directory exports --overwrite

The flags are the options of `ExportConfiguration`; they have the last word, before the variables EXPORT_… of the
environment and the file.
"""

import argparse
import logging
import sys

from rwkv_lab.command_line import add_flags, settings_of
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.export import ConfigurationManager, ExportConfiguration, run_levels
from rwkv_lab.sigterm import sigterm_cleans_up


def main(words: list[str] | None = None) -> int:
    """Export as file, environment and flags state; the exit code: 1 after a refusal, or where a check fails."""
    fields = ExportConfiguration.model_fields
    parser = argparse.ArgumentParser("rwkv_lab.export", description="Write a checkpoint for PyTorch and onnxruntime.")
    parser.add_argument("--config", help="a YAML file with export: and its groups")
    add_flags(parser, fields)
    given = vars(parser.parse_args(words))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = given.pop("config")
        configurations = ConfigurationManager(config).resolve_levels(**settings_of(given, (), fields))
        failed = False
        with sigterm_cleans_up():
            for result in run_levels(configurations):
                for line in (*result.warnings, *result.checks):
                    print(line)
                print(f"{result.verdict}: {result.onnx_model_path or result.pytorch_model_path}")
                failed |= result.verdict.startswith("FAIL")
    except RwkvLabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
