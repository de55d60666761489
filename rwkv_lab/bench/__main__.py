"""`python -m rwkv_lab.bench`: the benchmarks as commands. Each writes JSON, a table and figures to a report folder."""

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rwkv_lab.bench.busy import measure_beside_a_busy_loop
from rwkv_lab.bench.comparison import Floors, Row, as_json, table
from rwkv_lab.bench.converting import benchmark_convert
from rwkv_lab.bench.converting import table as convert_table
from rwkv_lab.bench.exported import LENGTHS, WEIGHTS, measure_exported
from rwkv_lab.bench.file_jobs import table as file_table
from rwkv_lab.bench.gpu_wkv import FLA, measure_gpu
from rwkv_lab.bench.growth import measure_growth
from rwkv_lab.bench.loading import measure_loading
from rwkv_lab.bench.machine import describe_machine, floors_are_compiled
from rwkv_lab.bench.merging import benchmark_merge
from rwkv_lab.bench.models import SHAPES, random_model
from rwkv_lab.bench.operators import OPERATORS, Shape, measure_operators
from rwkv_lab.bench.peers import AUTO, parse_peers
from rwkv_lab.bench.scaling_runs import RUNS, SIZES, measure_scaling
from rwkv_lab.bench.scaling_runs import table as scaling_table
from rwkv_lab.bench.speed import LIMITS, Plan, measure_speed
from rwkv_lab.bench.training import measure_training
from rwkv_lab.checkpoint import write_text
from rwkv_lab.dtypes import in_short
from rwkv_lab.errors import DeviceError, NumericsError, ParameterError, RwkvLabError
from rwkv_lab.export.onnx_folder import Weights
from rwkv_lab.model.device import parse_device
from rwkv_lab.resources import reports_folder
from rwkv_lab.sigterm import sigterm_cleans_up
from rwkv_lab.wkv import backends

JOBS = {
    "models": "decode and prefill rates of whole models, beside peers",
    "wkv": "the WKV operators, forward and backward, beside their roofline",
    "training": "training steps of the demo model on every backend",
    "loading": "seconds and memory of loading a checkpoint",
    "growth": "time per token and memory along a context of up to 65,536 tokens",
    "busy": "pretraining, modes, prefill and decode beside a busy loop, by how threads wait",
    "export": "decode rates of exported models through onnxruntime, beside our own step and peers",
    "gpu": "WKV7 on a GPU, beside a copy and flash-linear-attention",
}
log = logging.getLogger(__name__)

_CONTEXTS = (1024, 4096, 16384, 65536)
_BASE_SHAPES = ("v7-0.1b", "v7-0.4b", "v4-169m", "v6-0.3b")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.job not in ("merge", "convert", "scaling"):
            _check_device(options.device)
        with sigterm_cleans_up(), tempfile.TemporaryDirectory(prefix="rwkv_lab-bench-", dir=Path.cwd()) as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            options.report.mkdir(parents=True, exist_ok=True)
            if options.job == "merge":
                _merge(options, folder)
            elif options.job == "convert":
                _convert(options, folder)
            elif options.job == "scaling":
                _scaling(options, folder, Path(temporary) / "out")
            else:
                _measure(options, folder)
    except RwkvLabError as e:
        raise SystemExit(f"{type(e).__name__}: {e}") from e


def _check_device(name: str) -> None:
    device = parse_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ParameterError(f'device: {name!r} cannot be measured; "cpu" and "cuda" can.')
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f'Nothing is measured: torch finds no CUDA device for {name!r}; use "cpu".')


def _positive(text: str) -> int:
    """For argparse: what is counted here begins with 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rwkv_lab.bench")
    jobs = parser.add_subparsers(dest="job", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--rounds", type=_positive, help="samples of everything (default 5, with --quick 3); fewer of what takes long"
    )
    common.add_argument("--threads", type=_positive, help="of torch and of the peers; by default as torch has it")
    common.add_argument(
        "--folder", type=Path, help="for models that are made here; by default a temporary one, removed at the end"
    )
    common.add_argument("--report", type=Path, default=reports_folder() / "bench")
    for job, help in {**JOBS, "all": "all of these"}.items():
        one = jobs.add_parser(job, help=help, parents=[common])
        one.add_argument("--quick", action="store_true", help="fewer shapes, lengths, batches and rounds")
        one.add_argument("--shapes", nargs="*", choices=SHAPES, help="models with random weights, made here")
        one.add_argument("--models", nargs="*", type=Path, default=[], help="checkpoints of your own, instead")
        one.add_argument("--dtypes", nargs="+", type=in_short, choices=LIMITS, default=list(Plan.dtypes))
        one.add_argument(
            "--lengths",
            nargs="+",
            type=_positive,
            help="tokens of prompts; the longest is the operators' too (default 512, and 2,048 for the first shape)",
        )
        one.add_argument("--batches", nargs="+", type=_positive, help="sequences decoded at once")
        one.add_argument("--contexts", nargs="+", type=_positive, help="tokens read before, for growth")
        one.add_argument("--backends", nargs="+", default=[], help="of the WKV operators; by default all there are")
        one.add_argument("--device", default="cpu")
        one.add_argument(
            "--peers",
            nargs="*",
            default=[AUTO],
            help="auto, rwkv, llama.cpp, or 'name=command'; see rwkv_lab/bench/peers.py",
        )
    merge = jobs.add_parser(
        "merge", help="wall time and memory of merging, beside cp and the naive script", parents=[common]
    )
    merge.add_argument("--sizes", nargs="+", choices=SHAPES, default=["v7-0.4b", "v7-1.5b"], help="shapes of the base")
    merge.add_argument("--lora-rank", type=_positive, default=32)
    convert = jobs.add_parser(
        "convert",
        help="wall time and memory of conversions, beside cp and other projects' converters",
        parents=[common],
    )
    sevens = [name for name in SHAPES if name.startswith("v7")]
    convert.add_argument("--sizes", nargs="+", choices=sevens, default=sevens[1:], help="shapes of the source")
    convert.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's sources, for its convert_hf_to_gguf.py")
    _add_scaling(jobs)
    return parser


def _add_scaling(jobs: argparse._SubParsersAction) -> None:
    one = jobs.add_parser("scaling", help="memory, disk and time of every job beside their formulas")
    one.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="shapes of the models")
    one.add_argument("--jobs", nargs="+", choices=RUNS, default=list(RUNS), help="which; all by default")
    one.add_argument("--folder", type=Path, help="with <shape>.pth from before, or where models are made and stay")
    one.add_argument("--report", type=Path, default=reports_folder() / "bench")
    one.add_argument("--threads", type=_positive, help="of torch; by default as torch has it")


def _scaling(options: argparse.Namespace, folder: Path, work: Path) -> None:
    work.mkdir()
    report = measure_scaling(folder, work, options.sizes, options.jobs)
    _write_report(options.report, "scaling", report, scaling_table(report))


def _merge(options: argparse.Namespace, folder: Path) -> None:
    report = benchmark_merge(folder, options.sizes, options.rounds or 5, options.lora_rank)
    _write_report(options.report, "merge", report, file_table(report["results"], "base"))


def _convert(options: argparse.Namespace, folder: Path) -> None:
    report = benchmark_convert(folder, options.sizes, options.rounds or 5, options.llama_cpp)
    _write_report(options.report, "convert", report, convert_table(report))


def _write_report(folder: Path, job: str, report: dict, table: str) -> None:
    write_text(folder / f"{job}.json", json.dumps(report, indent=1) + "\n", overwrite=True)
    write_text(folder / f"{job}.md", table + "\n", overwrite=True)
    print(json.dumps(report["machine"]), table, folder / f"{job}.json", sep="\n")


def _measure(options: argparse.Namespace, folder: Path) -> None:
    """Run one job or all of them.

    Raises:
        NumericsError: something of ours disagreed; what did not is written.
        RwkvLabError: a job has no figure of ours at all.
    """
    quick, rounds = options.quick, options.rounds or (3 if options.quick else 5)
    names = options.backends or list(backends())
    peers = tuple(parse_peers(options.peers))
    plan = Plan(
        dtypes=tuple(options.dtypes),
        lengths=tuple(options.lengths or ((512,) if quick else Plan.lengths)),
        batches=tuple(options.batches or ((1, 8, 32) if quick else Plan.batches)),
        rounds=rounds,
        device=options.device,
        peers=peers,
    )
    print(json.dumps(describe_machine()), f"WKV backends: {', '.join(names)}", sep="\n", flush=True)
    if not floors_are_compiled():
        print("No C++ compiler works here: floors are what torch reaches, which is less than the machine can do.")
    jobs = list(JOBS) if options.job == "all" else [options.job]
    if options.job == "all" and not torch.cuda.is_available():
        jobs.remove("gpu")
        print("The job gpu is left out: torch finds no CUDA device.")
    wrong, empty = [], []
    for job in jobs:
        rows: list[Row] = []
        floors: Floors = {}
        if job == "wkv":
            shape = Shape(length=max(options.lengths or [512 if quick else 2048]))
            rows, floors = measure_operators(shape, names, rounds, options.device, OPERATORS)
        elif job == "gpu":
            rows, floors = measure_gpu(rounds)
        elif job == "training":
            rows = measure_training(names, rounds)
        else:
            for number, (subject, path) in enumerate(_subjects(options, job, folder)):
                if job == "models":
                    # Peers take minutes for long prompts of larger models: without a choice the first shape is enough.
                    chosen = options.lengths or options.models or number == 0
                    lengths = plan.lengths if chosen else plan.lengths[:1]
                    found, now = measure_speed(path, subject, replace(plan, lengths=lengths))
                    rows += found
                    for name, samples in now.items():
                        floors.setdefault(name, []).extend(samples)
                elif job == "loading":
                    rows += measure_loading(path, subject, plan.dtypes, rounds, peers)
                elif job == "export":
                    weights: list[Weights] = [one for one in WEIGHTS if one in plan.dtypes]
                    rows += measure_exported(path, subject, folder, rounds, options.lengths or LENGTHS, peers, weights)
                elif job == "busy":
                    rows += measure_beside_a_busy_loop(path, subject, rounds, plan.dtypes[0])
                else:
                    contexts = options.contexts or (_CONTEXTS[:2] if quick else _CONTEXTS)
                    rows += measure_growth(path, subject, plan.dtypes[0], contexts, rounds, options.device)
        _write(options.report, job, rows, floors)
        ours = [row for row in rows if row.engine not in {FLA, *(peer.name for peer in peers)}]
        wrong += [f"{row.job} {row.subject} {row.name}" for row in ours if row.disagrees]
        if not any(row.samples for row in ours):
            empty.append(f"{job} ({next((row.problem for row in ours), 'nothing to measure')})")
    if wrong:
        raise NumericsError("No rate is reported of what disagrees with the reference: " + "; ".join(wrong))
    if empty:
        raise RwkvLabError("Nothing of ours was measured: " + "; ".join(empty))


def _subjects(options: argparse.Namespace, job: str, folder: Path) -> list[tuple[str, Path]]:
    """(name, checkpoint) of what a job is about; random models are made where they are not in the folder yet."""
    if options.models:
        return [(path.stem or path.name, path) for path in options.models]
    # Loading and growth are alike for every shape: without a choice the smallest is enough.
    shapes = options.shapes or (_BASE_SHAPES if job == "models" and not options.quick else _BASE_SHAPES[:1])
    found = []
    for shape in shapes:
        path = folder / f"{shape}.pth"
        if not path.exists():
            log.info("Making a model of shape %s with random weights.", shape)
            random_model(path, SHAPES[shape])
        found.append((shape, path))
    return found


def _write(report: Path, job: str, rows: Sequence[Row], floors: Floors) -> None:
    """`<job>.json`, `<job>.md`, and figures where matplotlib is installed."""
    described = describe_machine()
    write_text(report / f"{job}.json", as_json(described, floors, rows), overwrite=True)
    write_text(report / f"{job}.md", table(rows) + "\n", overwrite=True)
    print(table(rows), report / f"{job}.json", sep="\n", flush=True)
    try:
        # This command is a door as the notebooks are one, and draws what they draw.
        from rwkv_lab.bench.figures import all_figures
        from rwkv_lab.plotting import png
    except ImportError:
        print("No figures: matplotlib is not installed.")
        return
    subtitle = f"{described['cpu']}, {described['threads']} threads, torch {described['torch']}, {described['date']}"
    for name, (_, _, figure) in all_figures(rows, floors, subtitle).items():
        path = report / f"{job}-{name}.png"
        path.write_bytes(png(figure))
        print(path)


if __name__ == "__main__":
    main()
