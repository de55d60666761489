"""`python -m rwkv_lab.bench merge`: the benchmarks as commands."""

import argparse
import json
import tempfile
from pathlib import Path

from rwkv_lab.bench.merging import benchmark_merge, table
from rwkv_lab.bench.models import SHAPES
from rwkv_lab.checkpoint import write_text
from rwkv_lab.resources import checkout_folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rwkv_lab.bench")
    jobs = parser.add_subparsers(dest="job", required=True)
    merge = jobs.add_parser("merge", help="wall time and memory of merging, beside cp and the naive script")
    merge.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.4B", "1.5B"], help="shapes of the base")
    merge.add_argument("--rounds", type=int, default=5)
    merge.add_argument("--lora-rank", type=int, default=32)
    merge.add_argument(
        "--folder", type=Path, help="for inputs and outputs; by default a temporary one, removed at the end"
    )
    merge.add_argument("--report", type=Path, default=(checkout_folder() or Path.cwd()) / "reports" / "bench")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-bench-", dir=Path.cwd()) as temporary:
        folder = options.folder or Path(temporary)
        report = benchmark_merge(folder, options.sizes, options.rounds, options.lora_rank)
    options.report.mkdir(parents=True, exist_ok=True)
    write_text(options.report / "merge.json", json.dumps(report, indent=1) + "\n", overwrite=True)
    write_text(options.report / "merge.md", table(report) + "\n", overwrite=True)
    print(json.dumps(report["machine"]), table(report), options.report / "merge.json", sep="\n")


if __name__ == "__main__":
    main()
