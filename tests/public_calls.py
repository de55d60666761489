"""A valid call of every public function and method, on tiny files: what tests of wrong arguments start from."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from models import random_model, random_state
from random_rwkv7 import add_random_time_state, make_model
from torch import nn

import rwkv_lab.peft as peft
from rwkv_lab import analysis
from rwkv_lab.checkpoint import Layout, open_checkpoint, write_checkpoint
from rwkv_lab.checks import Check
from rwkv_lab.model import RWKV_Dual, StateCache, generate_stream, load_tokenizer, save_state
from rwkv_lab.peft import LoraConfig, apply_peft, open_adapter, save_adapter

PACKAGES = ("", ".checkpoint", ".wkv", ".model", ".peft", ".merge", ".train", ".convert", ".export")
# Classes whose methods are called by their own package, or that only hold what a function has found.
INTERNAL = {
    "AdapterKind": "a base class of extensions",
    "Target": "a base class of extensions",
    "LoraTarget": "what an adapter file holds",
    "MissTarget": "what an adapter file holds",
    "AdaptedLinear": "a base class of layers",
    "GenerationStream": "made by generate_stream",
    "MergeInputs": "made by open_inputs",
    "RWKVMode": "an Enum",
}

# What notebooks and `python -m rwkv_lab.bench` call; helpers beside these are called by their own package.
OFFERED = {
    "bench.speed": ["measure_speed"],
    "bench.growth": ["measure_growth"],
    "bench.loading": ["measure_loading"],
    "bench.operators": ["measure_operators"],
    "bench.training": ["measure_training"],
    "bench.gpu_wkv": ["measure_gpu"],
    "bench.merging": ["benchmark_merge"],
    "bench.converting": ["benchmark_convert"],
    "bench.peers": ["parse_peers"],
    "workbench": ["start", "show_panel"],
    "workbench.registry": ["notebook_names", "parameters_of", "cells_of"],
    "workbench.runs": ["list_runs", "write_index"],
}


class Call(NamedTuple):
    name: str
    function: Callable
    arguments: dict[str, Any]  # valid ones; parameters with a default may be left out


def public() -> Iterator[tuple[str, Any]]:
    """(name, function or class) of all that the packages export."""
    seen = set()
    for package in PACKAGES:
        module = import_module("rwkv_lab" + package)
        for name in module.__all__:
            found = getattr(module, name)
            if callable(found) and id(found) not in seen:
                seen.add(id(found))
                yield name, found
    yield from analyses()
    for module_name, names in OFFERED.items():
        module = import_module(f"rwkv_lab.{module_name}")
        yield from ((f"{module_name.split('.')[-1]}:{name}", getattr(module, name)) for name in names)


def analyses() -> Iterator[tuple[str, Any]]:
    """(module and name, function) of `rwkv_lab.analysis`, whose modules are imported one by one."""
    for found in pkgutil.iter_modules(analysis.__path__):
        module = import_module(f"{analysis.__name__}.{found.name}")
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == module.__name__:
                yield f"{found.name}:{name}", function


def methods(kind: type) -> list[str]:
    """The public methods that a class of this project defines, and those of its bases here."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("rwkv_lab")]
    names = {name: None for base in ours for name in vars(base) if not name.startswith("_")}
    plain = (FunctionType, classmethod, staticmethod)
    return [name for name in names if isinstance(inspect.getattr_static(kind, name), plain) and name != "forward"]


class World:
    """Tiny files and objects, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make_model(n_embd=32, n_layer=1, head_size=16)
        add_random_time_state(self.model)
        self.base, self.state_file = folder / "base.pth", folder / "state.pth"
        plain = make_model(n_embd=32, n_layer=1, head_size=16)
        write_checkpoint(self.base, plain.state_dict())
        tuned = {n: t for n, t in self.model.state_dict().items() if n.endswith("time_state")}
        write_checkpoint(self.state_file, tuned)
        write_checkpoint(folder / "there.pth", random_state())
        write_checkpoint(folder / "model.pth", random_model())
        (folder / "there.safetensors").write_bytes(b"")
        (folder / "there.gguf").write_bytes(b"")
        (folder / "there").mkdir()
        (folder / "text.txt").write_text("the cat sat on the mat; " * 600)
        self.adapted = make_model(n_embd=32, n_layer=1, head_size=16)
        apply_peft(self.adapted, LoraConfig(lora_r=2))
        with torch.no_grad():
            self.adapted.blocks[0].att.key.lora_B.fill_(0.1)
        self.adapter_file = folder / "adapter.pth"
        save_adapter(peft.adapter_of(self.adapted), self.adapter_file)
        self.adapter = open_adapter(self.adapter_file)
        self.checkpoint = open_checkpoint(self.base)
        self.layout: Layout = self.checkpoint.layout
        self.shapes = {name: info.shape for name, info in self.checkpoint.info.items()}
        self.tokens = torch.tensor([[5, 6]])
        self.logits, self.state = self.model.prefill(self.tokens)
        save_state(folder / "S.safetensors", self.state, self.model)
        self.linear = nn.Linear(32, 32, bias=False)
        self.open = ExitStack().enter_context


def wkv(name: str) -> dict[str, torch.Tensor]:
    x = torch.randn(1, 3, 2, 16)
    if name == "wkv4":
        k = torch.randn(1, 3, 16)
        return {"w": -torch.ones(16), "u": torch.ones(16), "k": k, "v": k}
    w = -torch.ones(2, 16) if name == "wkv5" else -torch.ones_like(x)
    rest = {"a": x, "b": x} if name == "wkv7" else {"u": torch.ones(2, 16)}
    return {"r": x, "w": w, "k": x, "v": x, **rest}


def calls_of_processor(w: World) -> dict[str, dict[str, Any]]:
    """Of `OptimizationProcessor`."""
    files = {"source": w.base, "out": w.folder / "there.pth"}
    return {
        "plan_quantisation": {"source": w.base},
        "apply_quantization": {"model": w.model},
        "remove_training_artifacts": files,
        "optimize_model_structure": files,
        "compress_model_weights": files | {"pytorch_format": "pth"},
        "calculate_size_reduction": {"original": 2, "optimised": 1},
    }


def calls(world: World) -> list[Call]:
    """A valid call of everything that is public, fast: jobs find their output there already, and refuse."""
    from rwkv_lab import convert, merge, train
    from rwkv_lab.export import ExportConfiguration, FormatExporter, ModelMerger
    from rwkv_lab.export.families.rwkv import Rwkv
    from rwkv_lab.export.family import WholeModel
    from rwkv_lab.merge import MergeOptions, MergeSpec, open_inputs, run_merge

    w, there = world, world.folder / "there.pth"
    merge_spec = MergeSpec.read({"base": str(w.base), "tuned": str(w.state_file)})
    inputs = open_inputs(merge_spec)
    merged = run_merge(merge_spec, w.folder / "merged.pth", MergeOptions.read({}))
    small = {"steps": 1, "batch_size": 1, "ctx_len": 4, "data": str(w.folder / "text.txt"), "base": str(w.base)}
    train_spec = train.TrainSpec.read({"kind": "state", **small})
    trained = train.train("state", w.folder / "trained.pth", samples=False, **small)
    import rwkv_lab.convert as conversion

    convert_spec = conversion.ConvertSpec.read({"source": str(w.base), "to": "safetensors"})
    converted = conversion.run_convert(convert_spec, w.folder / "converted.safetensors")
    merger = ModelMerger()
    to_merge = merger.merge_lora_weights(merger.load_base_model(w.base), merger.load_lora_adapter(w.adapter_file))
    corpus = train.load_corpus(str(w.folder / "text.txt"))
    quantised = peft.quantize_nf4(w.linear.weight.detach())
    eight = peft.quantize_int8(w.linear.weight.detach())
    exported = ExportConfiguration.read({"checkpoint_path": str(w.folder / "missing.pth")})
    messages = [{"role": "user", "content": "Hello"}]
    tensor_info = w.checkpoint.info["emb.weight"]
    found: dict[str, dict[str, Any]] = {
        **{name: wkv(name) for name in ("wkv4", "wkv5", "wkv6", "wkv7")},
        "empty_wkv4_state": {"B": 1, "A": 4},
        "use_backend": {"name": "reference"},
        "RWKV_Dual": {"n_embd": 32, "n_layer": 1, "vocab_size": 257, "head_size": 16, "ctx_len": 8},
        "RWKV_Dual.from_pretrained": {"path": w.base},
        "RWKV_Dual.save_pretrained": {"folder": w.folder / "saved"},
        "RWKV_Dual.__call__": {"tokens": w.tokens},
        "RWKV_Dual.parallel": {"tokens": w.tokens},
        "RWKV_Dual.prefill": {"tokens": w.tokens},
        "RWKV_Dual.load_state_file": {"path": w.state_file},
        "RWKV_Dual.set_mode": {"mode": "transformer"},
        "RWKV_Dual.tokenizer": {"which": "bytes"},
        "RWKV_Dual.batch_decode": {"list_of_ids": [[5]]},
        "RWKV_Dual.generate_with_streaming": {"prompt": "x", "max_new_tokens": 1},
        "init_state_with_past": {"model": w.model, "tokens": w.tokens},
        "RWKVState.expand": {"batch_size": 2},
        "RWKVState.rows": {"rows": [0]},
        "ByteTokenizer": {"vocab_size": 257},
        **{f"{kind}.encode": {"text": "x"} for kind in ("ByteTokenizer", "WorldTokenizer")},
        **{f"{kind}.decode": {"ids": [5]} for kind in ("ByteTokenizer", "WorldTokenizer")},
        **{f"{kind}.decode_bytes": {"ids": [5]} for kind in ("ByteTokenizer", "WorldTokenizer")},
        "StateCache": {"max_bytes": 10**6},
        "StateCache.put": {"model": w.model, "tokens": [1], "state": w.state, "logits": w.logits[0]},
        "StateCache.longest_prefix": {"model": w.model, "tokens": [1]},
        "agreement_of_logits": {"found": w.logits, "expected": w.logits},
        "bits_per_byte": {"model": w.model, "data": b"abc", "ctx_len": 4},
        "capture": {"model": w.model},
        "chat": {"model": w.model, "messages": messages, "max_new_tokens": 1},
        "render_turns": {"messages": messages},
        "Turn": {"text": "x", "role": "user", "is_assistant": False},
        "generate": {"model": w.model, "prompts": ["x"], "max_new_tokens": 1},
        "generate_stream": {"model": w.model, "prompt": "x", "max_new_tokens": 1},
        "load_state": {"path": w.folder / "S.safetensors", "model": w.model},
        "save_state": {"path": w.folder / "there.safetensors", "state": w.state, "model": w.model},
        "load_tokenizer": {"which": "bytes"},
        "quantise_weights": {"model": w.model, "scheme": "int8"},
        "row_seed": {"seed": 0, "row": 1},
        "open_checkpoint": {"path": w.base},
        "compare": {"layout": w.layout, "shapes": w.shapes},
        "detect_layout": {"shapes": w.shapes},
        "expected_tensors": {"layout": w.layout},
        "tensors_of": {"layout": w.layout, "names": list(w.shapes)},
        "file_facts": {"source": w.base},
        "write_checkpoint": {"path": there, "tensors": {"a": torch.ones(2)}},
        "write_text": {"path": w.folder / "there.txt", "text": "x", "overwrite": True},
        "TensorInfo.check": {"crc": 0},
        "TensorInfo.pieces": {"size": 4},
        "Adapter.check": {"shapes": w.shapes, "base": "base.pth"},
        "LoraLinear.from_linear": {"linear": w.linear, "r": 2},
        "LoraLinear.pack": {"quant": "none"},
        "refuse_overlap": {"adapters": [w.adapter]},
        "open_adapter": {"path": w.adapter_file},
        "save_adapter": {"adapter": w.adapter, "path": there},
        "save_pissa_init": {"adapter": w.adapter, "path": there},
        "register": {"kind": peft.ADAPTER_KINDS["lora"]},
        **{name: {"model": w.adapted} for name in ("adapter_of", "adapter_parameters", "adapters")},
        **{name: {"model": w.adapted} for name in ("count_parameters", "mark_only_lora_as_trainable")},
        **{name: {"model": w.adapted} for name in ("merged_state_dict", "print_model_param")},
        "apply_peft": {"model": w.adapted, "lora_config": LoraConfig(lora_r=2)},
        "load_adapter": {"model": w.model, "adapter": w.adapter},
        "load_model_and_apply_peft": {"config": {"path": str(w.base)}, "lora_config": LoraConfig(lora_r=2)},
        "planned_parameters": {
            "name": "blocks.0.att.key",
            "out_features": 8,
            "in_features": 8,
            "lora_config": LoraConfig(lora_r=2),
        },
        "quantise_blocks": {"model": w.adapted, "quant": "none"},
        **{f"{name}Linear": {"in_features": 64, "out_features": 64} for name in ("Lora", "Pissa", "Miss", "NF4")},
        "dequantize_int8": {"codes": eight[0], "absmax": eight[1]},
        "dequantize_fp4": {"codes": quantised[0], "absmax": quantised[1], "shape": (32, 32)},
        "dequantize_bnb_int8": dict(zip(("codes", "absmax"), peft.quantize_bnb_int8(torch.ones(4, 4)), strict=True)),
        "quantize_fp4": {"weight": torch.randn(32, 32)},
        "quantize_bnb_int8": {"weight": torch.randn(32, 32)},
        "dequantize_nf4": {"codes": quantised[0], "absmax": quantised[1], "shape": (32, 32)},
        "quantised_and_back": {"weight": torch.randn(32, 32), "quant": "nf4"},
        "quantize_int8": {"weight": torch.randn(32, 32)},
        "quantize_nf4": {"weight": torch.randn(32, 32)},
        "check_files": {"spec": merge_spec},
        "check_spec": {"spec": merge_spec},
        "extract_lora": {"base": w.base, "tuned": w.base, "out": there, "rank": 1},
        "merge": {"base": w.base, "tuned": w.state_file, "out": there},
        "merge_recipe": {"recipe": w.folder / "missing.yml", "out": there},
        "open_inputs": {"spec": merge_spec},
        "plan_merge": {"inputs": inputs, "spec": merge_spec, "out": there},
        "read_recipe": {"recipe": w.folder / "missing.yml"},
        "run_merge": {"spec": merge_spec, "out": there},
        "verify_merge": {"result": merged},
        "write_merge": {"plan": merged.plan},
        "compare_methods": {"base": w.folder / "there.pth", "data": str(w.folder / "text.txt"), "steps": 0},
        "held_out_bits": {"run": w.model, "material": None, "device": torch.device("cpu")},
        "in_batches": {"corpus": corpus, "tokenizer": load_tokenizer("bytes", 257), "ctx_len": 4, "seed": 0},
        "load_corpus": {"data": str(w.folder / "text.txt")},
        "make_plan": {"spec": train_spec},
        "measure_again": {"spec": train_spec, "out": w.folder / "trained.pth"},
        "open_trained": {"spec": train_spec, "out": w.folder / "trained.pth"},
        "plan_training": {"kind": "state", **small},
        "resume_path": {"out": w.folder / "trained.pth"},
        "run_training": {"plan": train.make_plan(train_spec), "out": there, "options": train.TrainOptions.read({})},
        "train": {"kind": "state", "out": there, **small},
        "verify_training": {"spec": train_spec, "result": trained},
        "convert": {"source": w.base, "to": "safetensors", "out": w.folder / "there.safetensors"},
        "plan_convert": {"spec": convert_spec, "out": w.folder / "there.safetensors"},
        "run_convert": {"spec": convert_spec, "out": w.folder / "there.safetensors"},
        "to_gguf": {"source": w.base, "out": w.folder / "there.gguf"},
        "questions": {"model": w.model, "corpus": corpus},
        "measure_held_out": {"model": w.model, "corpus": corpus},
        "to_huggingface": {"source": w.base, "out": w.folder / "there"},
        "to_pth": {"source": w.base, "out": there},
        "to_safetensors": {"source": w.base, "out": w.folder / "there.safetensors"},
        "verify_convert": {"result": converted},
        "export_onnx": {"model": w.folder / "missing.pth", "folder": w.folder / "there"},
        "OnnxModel": {"folder": w.folder / "there"},
        "FormatExporter": {
            "family": Rwkv(),
            "configuration": exported,
            "model": WholeModel(w.folder / "missing.pth", 1),
        },
        "FormatExporter.export_pytorch_model": {"out": there},
        "FormatExporter.export_onnx_model": {"folder": w.folder / "there"},
        "FormatExporter.export_tensorrt_model": {"onnx_folder": w.folder / "missing", "folder": w.folder / "there"},
        "FormatExporter.validate_onnx_export": {"path": w.folder / "missing.onnx"},
        "FormatExporter.optimize_onnx_graph": {"path": w.folder / "missing.onnx", "folder": w.folder / "there"},
        "OptimizationProcessor": {},
        **{f"OptimizationProcessor.{name}": given for name, given in calls_of_processor(w).items()},
        "ModelMerger.load_base_model": {"path": w.base},
        "ModelMerger.load_lora_adapter": {"path": w.adapter_file},
        "ModelMerger.merge_lora_weights": {"base": to_merge.base, "adapter": to_merge.adapter},
        "ModelMerger.save_merged_model": {"planned": to_merge, "out": there},
        "ModelMerger.verify_merge_integrity": {"merged": merger.save_merged_model(to_merge, w.folder / "adapted.pth")},
        "CheckpointDetector": {"path": w.folder},
        "ConfigurationManager": {"environment": {}},
        "MonitoringLogger": {},
        "run_levels": {"configurations": []},
        "plan_export": {"configurations": [exported]},
        "run": {"configuration": exported},
        "compare_logits": {"result": converted},
        "write_convert": {"plan": converted.plan},
        "download": {"repo_id": "no name", "file": "x.pth"},
        "push_to_hub": {"path": w.folder / "missing.pth", "model_name": "owner/name"},
        **{f"{spec.__name__}.read": {"values": {}} for spec in (MergeSpec, MergeOptions, train.TrainSpec)},
        **calls_of_analyses(w, merged, converted),
        **calls_of_benchmarks(w.folder / "missing.pth"),
        "workbench:start": {"notebook": "none", "namespace": {}},  # a valid one trains the demo model
        "workbench:show_panel": {"run": None},
        "registry:parameters_of": {"notebook": "merge"},
        "registry:cells_of": {"notebook": "merge"},
        "runs:list_runs": {"folder": w.folder},
        "runs:write_index": {"folder": w.folder},
    }
    instances = {
        "RWKV_Dual": w.model,
        "RWKVState": w.state,
        "ByteTokenizer": load_tokenizer("bytes", 257),
        "WorldTokenizer": load_tokenizer("world"),
        "StateCache": StateCache(10**6),
        "Checkpoint": w.checkpoint,
        "TensorInfo": tensor_info,
        "FormatExporter": FormatExporter(Rwkv(), exported, WholeModel(w.folder / "missing.pth", 1)),
        "ModelMerger": merger,
        "Adapter": w.adapter,
        "LoraLinear": w.adapted.blocks[0].att.key,
    }
    assert isinstance(Check, type) and convert and merge and generate_stream and RWKV_Dual  # used by name above
    return list(_with_functions(found, instances))


def calls_of_analyses(w: World, merged: Any, converted: Any) -> dict[str, dict[str, Any]]:
    from rwkv_lab.analysis.agreement import Execution
    from rwkv_lab.analysis.tuning import TuningOptions, open_tuning
    from rwkv_lab.train import load_corpus

    state = w.open(open_tuning(w.base, w.state_file))
    lora = w.open(open_tuning(w.base, w.folder / "adapter.pth", TuningOptions()))
    execution, name = Execution(w.model), "blocks.0.att.key"
    one = {"model": w.model, "tokens": w.tokens}
    return {
        "ablation:measure_ablation": {"tuning": state, "names": ["blocks.0.att.time_state"], "text": b"abcdef"},
        "agreement:check_memory": {"ck": w.checkpoint},
        "agreement:compare_modes": {**one, "dtypes": [torch.float32], "backends": ["reference"]},
        "agreement:agreement_checks": {"rows": []},
        "agreement:growth_checks": {"rows": []},
        "agreement:check_hand_off": {"model": w.model, "tokens": w.tokens},
        "agreement:in_dtype": {"model": w.model, "dtype": torch.float32},
        "agreement:error_curve": {"found": w.logits, "expected": w.logits},
        "answers:load_to_ask": {"path": w.base},
        "answers:refuse_as_adapter": {"ck": w.open(open_checkpoint(w.folder / "adapter.pth"))},
        "answers:read_prompts": {"path": str(w.folder / "text.txt")},
        "behaviour:compare_behaviour": {"result": None},  # a valid one reads corpora and takes seconds each time
        "changes:count_values": {"tuning": lora, "changed": [f"{name}.weight"]},
        "changes:measure_changes": {"tuning": lora, "names": [f"{name}.weight"]},
        "changes:compare_directions": {"one": lora, "other": lora, "names": [f"{name}.weight"]},
        "conversion:compare_conversion": {"result": converted, "prompt": "x", "tokens": 1},
        "conversion:value_ranges": {"result": converted},
        "conversion:changes_of_values": {"result": converted},
        "deltas:deltas": {"base": w.checkpoint, "merged": w.checkpoint, "names": ["emb.weight"]},
        "dynamics:measure_dynamics": one,
        "mismatch:first_mismatch": {"reference": execution, "suspect": execution, "tokens": w.tokens},
        "mismatch:explain_failures": {**one, "rows": []},
        "spectra:effective_rank": {"singular_values": torch.ones(3)},
        "spectra:adapter_spectra": {"base": w.checkpoint, "adapter": w.adapter},
        "spectra:model_spectra": {"base": w.checkpoint, "tuned": {}},
        "spectra:delta": {"base": w.checkpoint, "adapter": w.adapter, "layer": name},
        "spectra:cosine": {"first": torch.ones(3), "second": torch.ones(3)},
        "state_effects:state_heads": {"tuning": state},
        "state_effects:measure_state_effect": {
            **{"tuning": state, "data": str(w.folder / "text.txt"), "texts": 2, "length": 4}
        },
        "texts:held_out_text": {"data": str(w.folder / "text.txt")},
        "texts:excerpts": {"text": b"abc\ndef", "count": 2, "size": 3},
        "texts:held_out_excerpts": {"data": str(w.folder / "text.txt"), "count": 2, "size": 8},
        "texts:fixed_tokens": {"vocab_size": 257},
        "texts:tokens_to_read": {"model": w.model, "batch": 1, "length": 4, "data": str(w.folder / "text.txt")},
        "texts:held_out_tokens": {"corpus": load_corpus(str(w.folder / "text.txt")), "vocab_size": 257},
        "tuned_model:why_not_run": {"tuning": state},
        "tuned_model:tuned_model": {"tuning": state},
        "tuned_model:model_as_trained": {"tuning": state},
        "tuned_model:set_tensors": {
            "model": w.model,
            "names": ["emb.weight"],
            "values": lambda name: w.checkpoint["emb.weight"],
        },
        "tuned_model:checked_model": {"tuning": state},
        "tuning:open_tuning": {"base": w.base, "tuned": w.state_file},
        "tuning:check_tuning": {"tuned": w.state_file, "options": TuningOptions()},
        "tuning:note_on_base": {"tuning": state},
        "tuning:tensor_part": {"name": f"{name}.weight"},
        "tuning:select_tensors": {"names": [f"{name}.weight"], "targets": ["att.key"]},
    }


def calls_of_benchmarks(missing: Path) -> dict[str, dict[str, Any]]:
    """What is measured is not there, or nothing: measuring takes seconds each time."""
    from rwkv_lab.bench.operators import Shape
    from rwkv_lab.bench.speed import Plan

    one = {"path": missing, "subject": "x", "rounds": 1}
    return {
        "speed:measure_speed": {"path": missing, "subject": "x", "plan": Plan(("fp32",), (), (), 1)},
        "growth:measure_growth": {**one, "dtype": "fp32", "contexts": [4]},
        "loading:measure_loading": {**one, "dtypes": []},
        "operators:measure_operators": {"shape": Shape(), "backends": [], "rounds": 1, "operators": []},
        "training:measure_training": {"backends": [], "rounds": 1, "length": 1},
        "gpu_wkv:measure_gpu": {"rounds": 1, "B": 1, "T": 16, "H": 1},
        "merging:benchmark_merge": {"folder": missing, "sizes": ["none"], "rounds": 1, "lora_rank": 1},
        "converting:benchmark_convert": {"folder": missing, "sizes": ["none"], "rounds": 1, "llama_cpp": None},
        "peers:parse_peers": {"wanted": ["auto"]},
    }


def _with_functions(found: dict[str, dict[str, Any]], instances: dict[str, Any]) -> Iterator[Call]:
    for name, function in public():
        if not inspect.isclass(function):
            yield Call(name, function, found.get(name, {}))
        elif name not in INTERNAL:
            if name in found:
                yield Call(name, function, found[name])
            for method in methods(function) if name in instances else ():
                owner = instances[name]
                yield Call(f"{name}.{method}", getattr(owner, method), found.get(f"{name}.{method}", {}))
    yield Call("RWKV_Dual.__call__", instances["RWKV_Dual"], found["RWKV_Dual.__call__"])
    yield Call("Checkpoint.__getitem__", instances["Checkpoint"].__getitem__, {"name": "emb.weight"})
