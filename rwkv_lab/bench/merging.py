"""What a merge costs, beside `cp` of the base and beside the script that people use today.

How every way is measured: `file_jobs.py`. Answers are compared before a figure is reported.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from rwkv_lab.arguments import Size, checked
from rwkv_lab.bench.comparison import Rounds
from rwkv_lab.bench.file_jobs import CP, copied, in_a_process, in_turn, measured, result
from rwkv_lab.bench.machine import describe_machine
from rwkv_lab.bench.models import SHAPES, check_sizes, random_lora, random_model, random_state
from rwkv_lab.errors import NumericsError
from rwkv_lab.paths import to_path

LORA_ALPHA = 32.0
WAYS = (CP, "state, scan=changed", "state, scan=all", "lora, scan=all", "naive state", "naive lora")


@checked
def benchmark_merge(folder: str | Path, sizes: list[str], rounds: Rounds, lora_rank: Size) -> dict:
    """Time every way at every size.

    Args:
        folder: where inputs and outputs go; needs free space for about three times the largest model.
        sizes: names from `SHAPES`.
        rounds: how often each way runs; the order turns by one each round.
        lora_rank: r of the LoRA.
    Returns:
        {"machine": …, "results": [{"size", "base_bytes", "way", "seconds": […], "anon_bytes": […]}]}
    Raises:
        ParameterError: a size that there is not.
        NumericsError: two ways disagree about the merged file.
    """
    folder = to_path(folder, "folder")
    check_sizes(sizes)
    results = []
    for size in sizes:
        inputs = _inputs(folder, size, lora_rank)
        _check_agreement(folder, inputs)
        runs = in_turn(size, WAYS, rounds, lambda way, inputs=inputs: _run(way, inputs, folder / "out.pth"))
        base_bytes = inputs["base"].stat().st_size
        results += [result(size, base_bytes, way, samples) for way, samples in runs.items()]
    return {"machine": describe_machine(), "rounds": rounds, "lora_rank": lora_rank, "results": results}


def _inputs(folder: Path, size: str, rank: int) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {k: folder / f"{size}-{k}.pth" for k in ("base", "state", f"lora{rank}")}
    makers: list[Callable[[Path], None]] = [
        lambda p: random_model(p, SHAPES[size]),
        lambda p: random_state(p, SHAPES[size]),
        lambda p: random_lora(p, SHAPES[size], rank),
    ]
    for path, make in zip(paths.values(), makers, strict=True):
        if not path.exists():
            make(path)
    return {"base": paths["base"], "state": paths["state"], "lora": paths[f"lora{rank}"]}


def _check_agreement(folder: Path, inputs: dict[str, Path]) -> None:
    """Our output against the naive script's, tensor by tensor."""
    for tuned, naive, ours in (("state", "naive state", "state, scan=all"), ("lora", "naive lora", "lora, scan=all")):
        outputs = folder / "naive.pth", folder / "out.pth"
        for way, out in zip((naive, ours), outputs, strict=True):
            _run(way, inputs, out)
        expected, got = (torch.load(p, mmap=True, weights_only=True) for p in outputs)
        if list(expected) != list(got):
            raise NumericsError(f"{tuned}: the two outputs do not have the same tensors")
        # The naive script adds B A in bfloat16, with two roundings more than ours: 3 units in the last place.
        limit = 0.0 if tuned == "state" else 3 * torch.finfo(torch.bfloat16).eps
        for name in expected:
            a, b = expected[name], got[name]
            if not torch.equal(a, b) and float((a.float() - b.float()).abs().max()) > limit * float(a.abs().max()):
                raise NumericsError(f"{tuned}: {name} differs from the naive script's; no figures are reported")
        outputs[0].unlink()


def _run(way: str, inputs: dict[str, Path], out: Path) -> dict:
    out.unlink(missing_ok=True)
    out.with_name(out.name + ".json").unlink(missing_ok=True)
    if way == CP:
        return copied(inputs["base"], out)
    tuned = inputs["lora" if "lora" in way else "state"]
    return in_a_process("rwkv_lab.bench.merging", way, inputs["base"], tuned, out)


def _naive_state(base: str, tuned: str, out: str) -> None:
    weights = torch.load(base, map_location="cpu", weights_only=True)
    for name, value in torch.load(tuned, map_location="cpu", weights_only=True).items():
        weights[name] = value.clone()
    torch.save(weights, out)


def _naive_lora(base: str, tuned: str, out: str) -> None:
    weights = torch.load(base, map_location="cpu", weights_only=True)
    adapter = torch.load(tuned, map_location="cpu", weights_only=True)
    for name in adapter:
        if name.endswith(".lora_A"):
            stem, a = name.removesuffix(".lora_A"), adapter[name]
            weights[f"{stem}.weight"] += adapter[f"{stem}.lora_B"] @ a * (LORA_ALPHA / a.shape[0])
    torch.save(weights, out)


def _measured(way: str, base: str, tuned: str, out: str) -> dict:
    """In the child process: run one way, sample its memory."""
    from rwkv_lab.merge import merge

    def ours() -> None:
        scan = way.split("scan=")[1]
        merge(base, tuned, out, alpha=LORA_ALPHA if "lora" in way else None, scan=scan)

    job = {"naive state": lambda: _naive_state(base, tuned, out), "naive lora": lambda: _naive_lora(base, tuned, out)}
    return measured(job.get(way, ours))


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
