"""ONNX graphs made ready for TensorRT, checked as far as that is possible here, and built where TensorRT is there.

Whether TensorRT takes a graph is known when it has built an engine, and not before: without one, the result says that
none was built, and why.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_lab.checkpoint.atomic import atomic_folder
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import FormatExportError
from rwkv_lab.export import build_engine
from rwkv_lab.export.family import Reference
from rwkv_lab.export.onnx_model import OnnxModel

PROFILES, EXPECTED = "profiles.json", "expected.npz"
_SCRIPT = Path(build_engine.__file__)
_LONGEST = 16  # tokens of what is stored to compare engines with: logits are [B,T,V]
_LIMIT = 1e-4  # largest error of onnxruntime relative to the scale of an output
Sizes = Mapping[str, Sequence[int]]  # by name of an axis: least, optimal and largest


@dataclass(frozen=True)
class TensorRTExport:
    """What became of it.

    engines: files by graph; none where none was built.
    reason: why not all were built, or what was not compared; "" where all is well.
    checks: what was seen to; without an engine they say nothing about TensorRT itself.
    """

    folder: Path
    engines: dict[str, Path]
    reason: str
    checks: list[Check | NotApplicable]

    @property
    def built(self) -> bool:
        """Whether there is an engine of every graph."""
        return bool(self.engines)

    def __str__(self) -> str:
        if self.built:
            return f"TensorRT: built {', '.join(self.engines)}" + (f" ({self.reason})" if self.reason else "")
        return f"TensorRT: not built ({self.reason})"


def export_tensorrt(
    onnx_folder: Path, folder: Path, sizes: Sizes, reference: Reference | None, overwrite: bool
) -> TensorRTExport:
    """Check the graphs of a folder for TensorRT, write what builds engines, and build them where that is possible.

    The folder has `build_engine.py`, which needs nothing of rwkv_lab; `profiles.json`, the shapes of inputs; what
    onnxruntime computes for one shape, `expected.npz`; and a README. The ONNX files stay where they are.

    Raises:
        FormatExportError: a graph has what TensorRT does not take, or computes something else than the model.
        OutputError: the folder is there already, or cannot be written.
    """
    from rwkv_lab.export.onnx.tensorrt_operators import check_for_tensorrt

    sizes = _with_cache(sizes)
    paths = sorted(onnx_folder.glob("*.onnx"))
    if not paths:
        raise FormatExportError(f"{onnx_folder} has no ONNX file to build an engine from.")
    checks: list[Check | NotApplicable] = []
    profiles = {path.name: _profile(path, sizes) for path in paths}
    for path in paths:
        checks += check_for_tensorrt(path, profiles[path.name])
    checks.append(_parity(onnx_folder, sizes, reference))
    with atomic_folder(folder, overwrite) as inside:
        plan = {"onnx": os.path.relpath(onnx_folder.resolve(), folder.resolve()), "graphs": profiles}
        _write(inside, onnx_folder, plan, sizes)
        engines, reason, compared = _build(inside, paths)
    return TensorRTExport(folder, {name: folder / path for name, path in engines.items()}, reason, checks + compared)


def _with_cache(sizes: Sizes) -> dict[str, Sequence[int]]:
    """Sizes of a cache and of an attention mask over it, too: as many tokens may lie behind as are read at once."""
    least, optimal, largest = sizes["length"]
    return {**sizes, "past": (0, optimal, largest), "past + length": (least, 2 * optimal, 2 * largest)}


def _profile(path: Path, sizes: Sizes) -> dict[str, list[list[int]]]:
    """Least, optimal and largest shape of every input of a graph."""
    import onnx

    from rwkv_lab.export.onnx.check import shapes_of

    model = onnx.load(str(path), load_external_data=False)
    outputs, profile = {value.name for value in model.graph.output}, {}
    for name, dims in shapes_of(model).items():
        if name in outputs:
            continue
        for dim in dims:
            if isinstance(dim, str) and dim not in sizes:
                raise FormatExportError(
                    f"{path.name}: the axis {dim or 'without a name'} of {name} can have any size, and none is stated "
                    f"for TensorRT; stated are {', '.join(sizes)}."
                )
        profile[name] = [[sizes[dim][i] if isinstance(dim, str) else dim for dim in dims] for i in range(3)]
    return profile


def _parity(onnx_folder: Path, sizes: Sizes, reference: Reference | None) -> Check | NotApplicable:
    """The files that engines are built from, run by onnxruntime, against the model."""
    shapes = [(sizes["batch"][i], sizes["length"][i]) for i in range(2)]
    shown = ", ".join(f"{B}x{T}" for B, T in shapes)
    name = f"onnxruntime and torch, on the files for TensorRT at {shown}: largest relative error"
    if reference is None:
        return NotApplicable(name, "the model was not given to compare with")
    graph, worst = OnnxModel(onnx_folder, low_memory=True), 0.0
    for B, T in shapes:
        tokens = np.random.default_rng(B + T).integers(0, reference.vocab_size, (B, T))
        found, state = graph.run(tokens)
        expected, after = reference.run(tokens)
        pairs = [(found, expected[:, -1] if found.ndim == 2 else expected)]
        pairs += [(state[part], array) for part, array in reference.arrays(after).items()]
        worst = max(worst, *(relative_error(*pair) for pair in pairs))
    limit = _LIMIT if graph.weights == "fp32" else 1e-2  # float16 weights are what is compared, too
    if not worst <= limit:
        raise FormatExportError(f"The ONNX files for TensorRT do not compute what the model does: {worst:.3g} apart.")
    return Check(name, worst, limit, True)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error relative to the scale of what is expected; infinite where it has another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


# ------------------------------------------------------------------ what is written


def _write(folder: Path, onnx_folder: Path, plan: dict[str, Any], sizes: Sizes) -> None:
    import onnx

    from rwkv_lab.export.onnx.run import random_inputs, run_file

    shutil.copyfile(_SCRIPT, folder / _SCRIPT.name)
    (folder / PROFILES).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    chosen = {name: min(max(three[0], _LONGEST), three[2]) for name, three in sizes.items()}
    chosen |= {"batch": sizes["batch"][1], "past + length": chosen["past"] + chosen["length"]}
    cases = {}
    for name in plan["graphs"]:
        path = onnx_folder / name
        inputs = random_inputs(onnx.load(str(path), load_external_data=False), chosen)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
        cases |= {f"{name}/in/{one}": array for one, array in inputs.items()}
        cases |= {f"{name}/out/{one}": array for one, array in run_file(path, inputs).items()}
    with open(folder / EXPECTED, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **cases)
    (folder / "README.md").write_text(_readme(plan), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def trtexec(name: str, onnx_folder: str, profile: dict[str, list[list[int]]]) -> str:
    """The command of TensorRT's own program that builds a graph's engine."""
    said = []
    for i, which in enumerate(("min", "opt", "max")):
        shapes = ",".join(f"{one}:{'x'.join(map(str, three[i]))}" for one, three in profile.items())
        said.append(f"--{which}Shapes={shapes}")
    return " ".join(["trtexec", f"--onnx={onnx_folder}/{name}", f"--saveEngine={Path(name).stem}.plan", *said])


def _readme(plan: dict[str, Any]) -> str:
    commands = "\n".join(trtexec(name, plan["onnx"], profile) for name, profile in plan["graphs"].items())
    return f"""\
# For TensorRT

On a machine with an NVIDIA GPU and the package tensorrt, 10 or 11, this builds an engine for each graph in
`{plan["onnx"]}`, and compares it with what onnxruntime computes (`{EXPECTED}`); the comparison needs torch with CUDA:

```sh
python {_SCRIPT.name}
```

Engines are `<graph>.plan`; they run on the kind of GPU and the version of TensorRT that they were built with. The
shapes that they take are in `{PROFILES}`: least, optimal and largest; edit them before building. Or by TensorRT's own
program, with `--stronglyTyped` added for TensorRT 10:

```sh
{commands}
```
"""


# ------------------------------------------------------------------ engines


def _build(folder: Path, paths: list[Path]) -> tuple[dict[str, str], str, list[Check | NotApplicable]]:
    """Run build_engine.py in a process of its own: engines by graph, why there are none, and what was compared."""
    if find_spec("tensorrt") is None:
        return {}, "the package tensorrt is not installed", []
    # The ONNX files are not where profiles.json says before the folder is.
    done = subprocess.run(
        [sys.executable, _SCRIPT.name, "--onnx", str(paths[0].parent.resolve())],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = [line["error"] for line in said if "error" in line]
    if not errors and (done.returncode or len(said) != len(paths)):
        errors = [f"{_SCRIPT.name} ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1][:300]}"]
    if errors:
        for path in folder.glob("*.plan"):  # of another graph, or one that computes something else
            path.unlink()
        return {}, errors[0], []
    engines = {line["graph"]: Path(line["engine"]).name for line in said}
    checks: list[Check | NotApplicable] = []
    reasons = set()
    for line in said:
        name = f"{line['graph']}: TensorRT {line['tensorrt']} and onnxruntime, largest relative error"
        error = line["error_of_outputs"]
        if isinstance(error, str):
            checks.append(NotApplicable(name, error))
            reasons.add(error)
        else:
            checks.append(Check(name, error, build_engine.LIMIT, error <= build_engine.LIMIT))
    return engines, ", ".join(sorted(reasons)), checks
