"""Builds TensorRT engines from the ONNX files that profiles.json names, and compares them with onnxruntime's outputs.

    python build_engine.py                             every graph
    python build_engine.py --graph step.onnx --tf32

It needs a GPU, the package tensorrt (10 or 11), and torch with CUDA for the comparison; nothing of rwkv_lab. It ends
with 1 where an engine is not built or is further off than --limit, and with 2 where tensorrt cannot be used here.
"""

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
DEVICE = "cuda"
LIMIT = 1e-3  # relative to the scale of an output: a GPU takes sums in another order


class NotBuiltError(Exception):
    """An engine is not built; the message says why."""


def main(words: list[str] | None = None) -> int:
    """Build, compare, print a line per graph as JSON; the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--graph", action="append", help="of profiles.json; may be repeated; all of them by default")
    parser.add_argument("--onnx", help="the folder of the ONNX files, where it is another than profiles.json says")
    parser.add_argument("--workspace-gib", type=float, help="GPU memory for layers at most; by default all there is")
    parser.add_argument("--tf32", action="store_true", help="round float32 products to TF32: faster, less exact")
    parser.add_argument("--limit", type=float, default=LIMIT, help="largest relative error of an output")
    options = parser.parse_args(words)
    plan = json.loads((HERE / "profiles.json").read_text("utf-8"))
    try:
        trt = import_module("tensorrt")
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)  # needs a driver
    except Exception as e:
        print(json.dumps({"error": f"tensorrt cannot be used here: {type(e).__name__}: {e}"}))
        return 2
    ended = 0
    for name, profile in plan["graphs"].items():
        if options.graph and name not in options.graph:
            continue
        said: dict[str, Any] = {"graph": name, "tensorrt": trt.__version__}
        try:
            path = HERE / (options.onnx or plan["onnx"]) / name
            engine = build(trt, builder, logger, path, profile, options)
            said["engine"] = str(engine)
            said["error_of_outputs"] = error = compare(trt, logger, engine, name)
            if isinstance(error, float) and not error <= options.limit:
                raise NotBuiltError(f"{name}: outputs are {error:.3g} off; the limit is {options.limit}")
        except NotBuiltError as e:
            said["error"], ended = str(e), 1
        print(json.dumps(said), flush=True)
    return ended


def build(trt: ModuleType, builder: Any, logger: Any, path: Path, profile: dict, options: argparse.Namespace) -> Path:
    """Parse a graph, build its engine and write it beside this script.

    Args:
        profile: least, optimal and largest shape by input.
    """
    # The graph states every type, so networks are strongly typed. TensorRT 11 knows no others, and no BuilderFlag.FP16.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if hasattr(trt.BuilderFlag, "FP16") else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):  # from its path: weights are in a file beside it
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise NotBuiltError(f"{path.name} is not parsed: {errors}")
    config = builder.create_builder_config()
    if options.workspace_gib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name not in profile:
            raise NotBuiltError(f"{path.name} has the input {name}, for which profiles.json states no shapes")
        shapes.set_shape(name, *(tuple(shape) for shape in profile[name]))
    if config.add_optimization_profile(shapes) < 0:
        raise NotBuiltError(f"{path.name}: TensorRT refuses the shapes of profiles.json")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise NotBuiltError(f"{path.name}: TensorRT builds no engine; what it printed says why")
    out = HERE / f"{path.stem}.plan"
    temporary = out.with_suffix(".partial")
    temporary.write_bytes(bytes(memoryview(engine)))
    os.replace(temporary, out)
    return out


def compare(trt: ModuleType, logger: Any, path: Path, graph: str) -> float | str:
    """Run an engine on the inputs of expected.npz; the largest error relative to an output's scale."""
    import numpy as np

    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise NotBuiltError(f"{path.name}: TensorRT does not read the engine that it built")
    try:
        import torch
    except ImportError:
        return "not compared: torch is not installed"
    if not torch.cuda.is_available():
        return "not compared: torch has no CUDA device"
    with np.load(HERE / "expected.npz", allow_pickle=False) as stored:
        cases = {name: stored[name] for name in stored.files if name.startswith(f"{graph}/")}
    context, tensors, outputs = engine.create_execution_context(), {}, {}
    for key, array in cases.items():
        kind, name = key.split("/")[1:]
        if kind == "in":
            tensors[name] = torch.from_numpy(array).to(DEVICE)
            context.set_input_shape(name, tuple(array.shape))
        else:
            outputs[name] = array
            tensors[name] = torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=DEVICE)
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        raise NotBuiltError(f"{path.name}: TensorRT does not run the engine")
    stream.synchronize()
    worst = 0.0
    for name, expected in outputs.items():
        found = tensors[name].cpu().numpy()
        if not np.isfinite(found).all():
            return float("inf")
        worst = max(worst, float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max())))
    return worst


if __name__ == "__main__":
    sys.exit(main())
