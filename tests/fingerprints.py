"""The sha256 of what one run of every kind gives, to compare two commits: a change of structure must change none.

    cd TREE && PYTHONPATH=$PWD python tests/fingerprints.py --out a.json
    python tests/fingerprints.py --compare a.json b.json

Only names that stay are used, so this file runs unchanged on older and newer trees: start it in the tree to be run.
Inputs are tiny and made from fixed seeds; one thread, since sums of several threads may be added in another order. The
hashes depend on processor, torch and Python: compare runs of one machine.

Of a file, `…:tensors` is the hash of names, dtypes, shapes and values, `…:file` that of all its bytes, which hold the
recipe and its wording too. Of a notebook, each part of `result.json` has a hash, without times, paths, versions and
memory. With `--keep FOLDER` these parts are also written there, for a diff.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

TREE = Path.cwd()
VERSIONS = ("4.0", "5.0", "5.1", "5.2", "6.0", "7.0")
RANKS = {"6.0": {"maa": 5, "decay": 7}, "7.0": {"w": 5, "a": 9, "v": 3, "g": 11}}
VOCABULARY = 257  # bytes: the tokenizer of the package
MATRICES = ("att.receptance", "att.key", "att.output", "ffn.key", "ffn.value")

Found = Iterator[tuple[str, str]]  # (name, sha256)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write; default: print it")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="print what differs; 1 if anything")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--keep", type=Path, help="folder for the parts of every result.json")
    given = parser.parse_args(arguments)
    if given.compare:
        return compare(*(json.loads(path.read_text()) for path in given.compare))
    import rwkv_lab

    if not Path(rwkv_lab.__file__).is_relative_to(TREE):
        parser.error(f"rwkv_lab comes from {rwkv_lab.__file__}; set PYTHONPATH={TREE} to run the tree you are in")
    import torch

    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), given.keep and given.keep.absolute())
        os.chdir(folder)  # names in provenances and results do not depend on where the files lie
        for part in given.only:
            for name, digest in PARTS[part](inputs):
                if name in found:
                    raise RuntimeError(f"{name} was given twice")
                found[name] = digest
        os.chdir(TREE)
    text = json.dumps(found, indent=0) + "\n"
    print(text, end="") if given.out is None else given.out.write_text(text)
    return 0


def compare(a: dict[str, str], b: dict[str, str]) -> int:
    """Print the names whose hashes differ; a file whose tensors are equal is told from one whose tensors are not."""
    lines = [f"only in the first:  {name}" for name in a if name not in b]
    lines += [f"only in the second: {name}" for name in b if name not in a]
    lines += [f"differs: {name}" for name in a if name in b and a[name] != b[name]]
    print("\n".join([*lines, f"{len(a.keys() & b.keys())} compared, {len(lines)} differences"]))
    return 1 if lines else 0


# ---------------------------------------------------------------------- hashes


def sha256(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def of_tensors(tensors) -> str:
    """Of names, dtypes, shapes and bits, in order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_output(name: str, path: Path) -> Found:
    """Of a checkpoint, or of the checkpoint in a folder."""
    from rwkv_lab import open_checkpoint

    with open_checkpoint(path) as ck:
        yield f"{name}:tensors", of_tensors({n: ck[n] for n in ck})
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        yield f"{name}:{file.name if path.is_dir() else 'file'}", sha256(file.read_bytes())


# ---------------------------------------------------------------------- inputs


class Inputs:
    """Models, and what may be merged into them or trained with, as files in one folder."""

    def __init__(self, folder: Path, keep: Path | None):
        self.folder, self.keep = folder, keep

    def save(self, name: str, tensors: dict) -> Path:
        import torch

        torch.save(tensors, self.folder / name)
        return self.folder / name

    def model(self, name: str, version: str = "7.0", seed: int = 0, n_layer: int = 2, dtype: str = "float32") -> Path:
        """A whole model with random values in which no part is idle."""
        import torch

        path = self.folder / name
        if not path.exists():
            tensors = random_tensors(version, seed, n_layer)
            self.save(name, {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()})
        return path

    def tuned(self, name: str, seed: int, size: float = 0.02) -> Path:
        """A fine-tune of `base.pth`."""
        noise, base = random_tensors("7.0", seed), random_tensors("7.0")
        return self.save(name, {n: t + size * noise[n] for n, t in base.items()})

    def adapter(self, name: str, shape_of: Callable[[int, int], dict[str, tuple]], seed: int = 3) -> Path:
        """In RWKV-PEFT's layout: of every matrix the parts that `shape_of(out, in)` names, with their shapes."""
        base, g = random_tensors("7.0"), generator(seed)
        tensors = {}
        for layer in (f"blocks.{i}.{m}" for i in range(2) for m in MATRICES):
            for part, shape in shape_of(*base[f"{layer}.weight"].shape).items():
                tensors[f"{layer}.{part}"] = 0.1 * normal(shape, g)
        return self.save(name, tensors)

    def text(self) -> Path:
        """Ten files, no two of them alike."""
        folder = self.folder / "texts"
        folder.mkdir(exist_ok=True)
        for i in range(10):
            (folder / f"{i}.txt").write_text(f"the cat sat on {i} mats; " * 40)
        return folder


def generator(seed: int):
    import torch

    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], g):
    import torch

    return torch.randn(tuple(shape), generator=g)


def random_tensors(version: str, seed: int = 0, n_layer: int = 2) -> dict:
    from rwkv_lab.checkpoint import Layout, expected_tensors

    heads = (0, 0) if version == "4.0" else (2, 16)
    layout = Layout(version, n_layer, 32, 32, 64, VOCABULARY, *heads, RANKS.get(version, {}))
    g = generator(seed)
    return {name: _random(name, shape, g) for name, shape in expected_tensors(layout)[0].items()}


def _random(name: str, shape: Sequence[int], g):
    noise, part = normal(shape, g), name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    if part.startswith("ln"):
        return 0.1 * noise + name.endswith(".weight")
    if part == "time_decay":
        return 2 * noise - 2  # decays from slow to very fast
    if part.startswith(("time_mix", "x_")) or part in ("time_maa_k", "time_maa_r"):
        return noise.sigmoid()
    if len(shape) == 3 or part in ("emb", "time_first", "time_faaaa"):
        return 0.5 * noise
    return noise * (shape[1] if name.endswith(".weight") else shape[0]) ** -0.5


# ---------------------------------------------------------------------- merges


def merges(inputs: Inputs) -> Found:
    """Every family of `merge`, a recipe, the extraction of an adapter, and taking out again what was merged."""
    from rwkv_lab import merge
    from rwkv_lab.merge import extract_lora, merge_recipe, verify_merge

    def done(name: str, out: str, result) -> Found:
        checks = [*result.checks, *verify_merge(result)]
        failed = [str(c) for c in checks if not c.passed]
        if failed:
            raise RuntimeError(f"{name}: {failed}")
        yield from of_output(f"merge/{name}", Path(out))
        yield f"merge/{name}:checks", sha256(repr([(c.value, c.limit) for c in checks]))

    for number, (name, tuned, given) in enumerate(_merges(inputs)):
        base = given.pop("base", "base.pth")
        out = f"{number}.safetensors" if number % 2 else f"{number}.pth"
        yield from done(name, out, merge(base, tuned, out, **given))
        if name in ("lora", "miss"):  # what was merged is taken out again
            undo = {**given, "parameters": {**given.get("parameters", {}), "unmerge": True}}
            yield from done(f"{name}, unmerged", f"un-{out}", merge(out, tuned, f"un-{out}", **undo))
    for name, text in RECIPES.items():
        Path("recipe.yml").write_text(text)
        yield from done(f"recipe, {name}", f"{name}.pth", merge_recipe("recipe.yml", f"{name}.pth"))
    for name, given in {"rank": {"rank": 3}, "energy": {"energy": 0.5, "dtype": "bf16"}}.items():
        result = extract_lora("base.pth", "one.pth", f"{name}.safetensors", **given)
        yield from of_output(f"extract/{name}", Path(f"{name}.safetensors"))
        yield f"extract/{name}:matrices", sha256(repr([(m.name, m.rank, m.energy, m.error) for m in result.matrices]))


def _merges(inputs: Inputs) -> Iterator[tuple[str, object, dict]]:
    """(name, tuned, other arguments of `merge`) of each merge."""
    inputs.model("base.pth")
    inputs.model("low.pth", dtype="bfloat16")
    for version in VERSIONS[:-1]:
        inputs.model(f"base{version}.pth", version)
    inputs.tuned("one.pth", 1)
    inputs.tuned("two.pth", 2)
    state = {f"blocks.{i}.att.time_state": normal((2, 16, 16), generator(7 + i)) for i in range(2)}
    inputs.save("state.pth", state)
    yield "state", "state.pth", {}
    yield "state, alpha 0.5, bfloat16 base", "state.pth", {"alpha": 0.5, "base": "low.pth"}
    for version in ("5.2", "6.0"):
        yield f"state, {version}", "state.pth", {"base": f"base{version}.pth", "method": "state"}
    yield "overlay", "one.pth", {"method": "overlay"}
    yield "overlay, alpha 0.5", "one.pth", {"alpha": 0.5}
    yield "overlay, alpha 0.5, float64", "one.pth", {"alpha": 0.5, "precision": "float64", "dtype": "bf16"}
    yield "overlay, chosen tensors", "one.pth", {"include": ["blocks.0.*"], "exclude": ["*ln1*"], "dtype": "fp16"}
    yield from _adapter_merges(inputs)
    yield from _mixes()
    inputs.model("deep.pth", seed=4, n_layer=3)
    layers = ["base[0:2]", "tuned[1:3]"]
    yield "passthrough", ["deep.pth"], {"method": "passthrough", "parameters": {"layers": layers}}


def _adapter_merges(inputs: Inputs) -> Iterator[tuple[str, object, dict]]:
    def lora(start: str = ""):
        return lambda out, into: {f"{start}lora_A": (4, into), f"{start}lora_B": (out, 4)}

    inputs.adapter("lora.pth", lora())
    inputs.adapter("lora2.pth", lora(), seed=4)
    inputs.adapter("start.pth", lora("init_"), seed=5)
    inputs.adapter("miss.pth", lambda out, into: {"disha": (6, out)})
    inputs.adapter("bat-hf.pth", lambda out, into: {"disha": (out // 4, 4, 4)})
    inputs.adapter("bat-rwkv-peft.pth", lambda out, into: {"disha": (into // 4, 4, 4)})
    yield "lora", "lora.pth", {"alpha": 6}
    yield "lora, bfloat16 base", "lora.pth", {"alpha": 6, "base": "low.pth"}
    for quant in ("nf4", "int8"):
        yield f"lora, {quant}", "lora.pth", {"alpha": 6, "parameters": {"quant": quant}}
    yield "rslora", "lora.pth", {"alpha": 6, "parameters": {"use_rslora": True}}
    yield "pissa", "lora.pth", {"pissa_init": "start.pth"}
    yield "pissa, residual base", "lora.pth", {"method": "pissa", "parameters": {"residual_base": True}}
    yield "miss", "miss.pth", {}
    for bat in ("hf", "rwkv-peft"):
        yield f"miss, bat of {bat}", f"bat-{bat}.pth", {"parameters": {"bat": bat}}
    yield "two adapters", ["lora2.pth", "miss.pth"], {"alpha": [8, None], "weights": [0.5, -1.5]}


def _mixes() -> Iterator[tuple[str, object, dict]]:
    both = ["one.pth", "two.pth"]
    by_tensor = {"blocks.*.att": 0.3, "*": {"gradient": [0, 0.5, 1]}}
    mixes = {
        "linear": {"weights": [0.2, 0.5, 0.3]},
        "task_arithmetic": {"weights": [0.5, 0.7], "alpha": 0.9},
        "ties": {"weights": [1, 0.5], "parameters": {"density": 0.4}},
        "dare_linear": {"weights": [1, 0.5], "parameters": {"density": 0.4, "seed": 3}},
        "dare_ties": {"weights": [1, 0.5], "parameters": {"density": 0.4, "seed": 3}},
        "model_stock": {},
    }
    for method, given in mixes.items():
        yield method, both, {"method": method, **given}
    yield "slerp", "one.pth", {"method": "slerp", "alpha": 0.4}
    yield "slerp, by tensor, bfloat16 base", "one.pth", {
        "method": "slerp", "base": "low.pth", "parameters": {"alpha": by_tensor}
    }  # fmt: skip


RECIPES = {
    "ties": """
merge_method: ties
base_model: base.pth
models:
  - model: one.pth
    parameters: {weight: [0.2, 1], density: 0.5}
  - model: two.pth
    parameters: {weight: [{filter: att, value: 0.4}, {value: 0.9}], density: 0.3}
dtype: float32
""",
    "slices": """
merge_method: passthrough
slices:
  - sources: [{model: base.pth, layer_range: [0, 2]}]
  - sources: [{model: deep.pth, layer_range: [1, 3]}]
dtype: bfloat16
""",
}


# ---------------------------------------------------------------------- trainings


def trainings(inputs: Inputs) -> Found:
    """Five steps of each kind, and of the options that change what is computed."""
    from rwkv_lab.train import train

    inputs.model("base.pth")
    inputs.text()
    sums = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(40)]
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    short = {"steps": 5, "batch_size": 4, "ctx_len": 16, "data": "texts", "lr": 3e-3, "base": "base.pth"}
    fresh = {"base": None, "n_embd": 32, "n_layer": 2, "head_size": 16}
    runs = {
        "pretrain": {"kind": "pretrain", **fresh},
        "pretrain, from a base": {"kind": "pretrain"},
        "full": {"kind": "full", "eval_every": 2, "accumulate": 2, "warmup": 2},
        "full, 6.0": {"kind": "full", "base": inputs.model("base6.0.pth", "6.0").name},
        "full, gradient checkpointing": {"kind": "full", "gradient_checkpointing": True},
        "full, autocast": {"kind": "full", "autocast": "bfloat16"},
        "state": {"kind": "state", "lr": 0.1},
        "state, nf4": {"kind": "state", "lr": 0.1, "quant": "nf4"},
        "lora, examples": {"kind": "lora", "rank": 2, "alpha": 5, "targets": ["att.*"], "data": "sums.jsonl"},
        "lora, bfloat16": {"kind": "lora", "rank": 2, "dtype": "bfloat16", "train_parts": ["ln", "time_state"]},
        **{kind: {"kind": kind, "rank": 4} for kind in ("lora", "pissa", "miss")},
        **{f"lora, {quant}": {"kind": "lora", "rank": 4, "quant": quant} for quant in ("nf4", "int8")},
        **{f"pissa, {quant}": {"kind": "pissa", "rank": 4, "quant": quant} for quant in ("nf4", "int8")},
        "miss, int8": {"kind": "miss", "rank": 4, "quant": "int8"},
    }
    for number, (name, given) in enumerate(runs.items()):
        out = Path(f"t{number}.pth")
        result = train(out=out, samples=name == "full", **short | given)
        yield from of_output(f"train/{name}", out)
        numbers = (result.losses, result.bits_before, result.bits_after, result.held_out_bytes, result.held_out)
        told = [(s.prompt, s.before, s.after) for s in result.samples]
        yield f"train/{name}:numbers", sha256(repr((*numbers, result.trained, result.frozen, told)))
    train(out="folder", samples=False, **short | {"kind": "lora", "rank": 2})
    yield from of_output("train/lora, folder", Path("folder"))


# ---------------------------------------------------------------------- models


def models(inputs: Inputs) -> Found:
    """Prefill and decode of every generation, by the compiled path and by the reference implementation."""
    import torch

    from rwkv_lab import RWKV_Dual
    from rwkv_lab.wkv import use_backend

    tokens = torch.randint(VOCABULARY, (2, 21), generator=generator(1))
    with torch.no_grad():
        for version in VERSIONS:
            file = inputs.model(f"base{version}.pth" if version != "7.0" else "base.pth", version)
            for dtype in (torch.float32, torch.bfloat16):
                model = RWKV_Dual.from_pretrained(file, dtype=dtype)
                for path in ("auto", "reference"):
                    with nullcontext() if path == "auto" else use_backend(path):
                        for name, tensors in _answers(model, tokens):
                            yield f"model/{version} {str(dtype)[6:]} {path}: {name}", of_tensors(tensors)
                with torch.enable_grad():
                    logits, _ = model(tokens)
                    logits.float().square().mean().backward()
                gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
                yield f"model/{version} {str(dtype)[6:]} auto: gradients", of_tensors(gradients)
        yield "model/fresh", of_tensors(_fresh().state_dict())
        text = RWKV_Dual.from_pretrained("base.pth").generate_with_streaming(prompt="The ", max_new_tokens=20)
        yield "model/generated", sha256(text)


def _answers(model, tokens) -> Iterator[tuple[str, dict]]:
    """Logits and states, read at once and token by token."""
    from rwkv_lab import RWKVMode, init_state_with_past

    model.set_mode(RWKVMode.TRANSFORMER)
    logits, state = model(tokens)
    yield "prefill", {"logits": logits, "wkv": state.wkv, "att": state.att_shift, "ffn": state.ffn_shift}
    model.set_mode(RWKVMode.RNN)
    state = init_state_with_past(model, tokens[:, :13])
    yield "state", {"wkv": state.wkv, "att": state.att_shift, "ffn": state.ffn_shift}
    for name, rows in {"decode": tokens, "decode one": tokens[:1]}.items():
        state, answers = model.create_state(batch_size=len(rows)), []
        for i in range(6):
            logits, state = model(rows[:, i : i + 1], state=state)
            answers.append(logits)
        yield name, dict(enumerate_names(answers)) | {"wkv": state.wkv}
    model.set_mode(RWKVMode.TRANSFORMER)


def enumerate_names(tensors: Sequence) -> Iterator[tuple[str, object]]:
    return ((f"{i:03}", tensor) for i, tensor in enumerate(tensors))


def _fresh():
    import torch

    from rwkv_lab import RWKV_Dual

    torch.manual_seed(5)
    return RWKV_Dual(n_embd=64, n_layer=2, vocab_size=VOCABULARY, head_size=32)


def operators(inputs: Inputs) -> Found:
    """The WKV operators with every backend, forward and backward."""
    import torch

    from rwkv_lab import wkv

    def leaf(*shape: int, seed: int):
        return normal(shape, generator(seed))

    B, T, H, N = 2, 19, 2, 16
    r, k, v, w, a = (leaf(B, T, H, N, seed=s) for s in range(5))
    w, state, u = -w.exp(), leaf(B, H, N, N, seed=6), leaf(H, N, seed=7)
    a = torch.nn.functional.normalize(a, dim=-1)
    flat = [x.flatten(2) for x in (k, v)]
    inputs_of = {
        "wkv4": [w[0, 0].flatten(), u.flatten(), *flat],
        "wkv5": [r, w[0, 0], k, v, u, state],
        "wkv6": [r, w, k, v, u, state],
        "wkv7": [r, -0.6065 * w.sigmoid(), k, v, -a, a * k.sigmoid(), state],
    }
    for name, given in inputs_of.items():
        for backend in wkv.backends():
            if backend == "cuda":
                continue
            leaves = [x.clone().requires_grad_() for x in given]
            y, after = getattr(wkv, name)(*leaves, backend=backend)
            (y.square().sum() + after.square().sum()).backward()
            tensors = {"y": y, "state": after} | dict(enumerate_names([x.grad for x in leaves]))
            yield f"{name}/{backend}", of_tensors(tensors)


# ---------------------------------------------------------------------- notebooks

# Fields that time, the machine or the place decide, by their names anywhere in result.json; those of the second line
# are rates of the benchmark and what describes them.
_MEASURED = re.compile(
    r"(^|_)(seconds?|versions|memory|path|date|started|finished|free|machine|threads|fingerprint|per_second)($|_)"
    r"|^(samples|foreign|other_load|shares|facts|min|median|max|disturbed|floors|problem)$"
)


def notebooks(inputs: Inputs) -> Found:
    """`result.json` of every notebook."""
    inputs.model("base.pth")
    inputs.tuned("one.pth", 1)
    inputs.save("state.pth", {f"blocks.{i}.att.time_state": normal((2, 16, 16), generator(7 + i)) for i in range(2)})
    text = inputs.text()
    (inputs.folder / "long.txt").write_text("".join((text / f"{i}.txt").read_text() for i in range(10)) * 3)
    train = {"steps": 5, "batch_size": 4, "ctx_len": 16, "base": "base.pth", "data": "texts", "out": "trained.pth"}
    runs = {
        "inspect": {"checkpoint": "base.pth"},
        "merge": {"base": "base.pth", "tuned": "state.pth", "out": "nb-state.pth"},
        "merge, overlay": {"base": "base.pth", "tuned": "one.pth", "alpha": 0.5, "out": "nb-overlay.pth"},
        "train": train | {"kind": "lora", "rank": 2, "eval_every": 2},
        "peft": {"base": "base.pth", "adapter": "one.pth", "data": "long.txt", "rank": 2},
        "peft, state": {"base": "base.pth", "adapter": "state.pth", "data": "long.txt"},
        "modes": {"model": "base.pth", "length": 40, "batch": 1, "dtypes": ["float32", "bfloat16"]},
        "benchmark": {"model": "base.pth", "lengths": [16], "batches": [1], "dtypes": ["fp32"], "rounds": 1}
        | {"peers": [], "backends": ["chunked"]},
    }
    with ThreadPoolExecutor(2) as pool:  # kernels take seconds to start
        results = pool.map(lambda item: run_notebook(inputs, *item), runs.items())
        for name, result in zip(runs, results, strict=True):
            for part, value in result.items():
                value = without_measurements(value)
                content = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
                if inputs.keep is not None:
                    inputs.keep.mkdir(parents=True, exist_ok=True)
                    (inputs.keep / f"{name} {part}.json").write_text(content)
                for key, one in value.items() if isinstance(value, dict) else [("", value)]:
                    content = json.dumps(one, ensure_ascii=False, sort_keys=True)
                    yield f"notebook/{name}: {part}{key and '.'}{key}", sha256(content)
            numbers = [[c[x] for x in ("value", "limit") if not isinstance(c[x], str)] for c in result["checks"]]
            yield f"notebook/{name}: checks, numbers", sha256(repr(numbers))
    for out in ("nb-state.pth", "nb-overlay.pth", "trained.pth"):
        yield from of_output(f"notebook/{out}", Path(out))


def run_notebook(inputs: Inputs, item: str, parameters: dict) -> dict[str, object]:
    """What `result.json` holds after a run."""
    notebook, report = item.split(",")[0], inputs.folder / f"report {item}"
    file = TREE / "notebooks" / f"{notebook}.ipynb"
    given = json.dumps(parameters | {"report": str(report)})
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", file, f"{item}.ipynb", "-y", given]
    done = subprocess.run(
        command, cwd=inputs.folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    result = json.loads((report / "result.json").read_text()) if (report / "result.json").exists() else {}
    if done.returncode or result.get("status") != "ok":
        raise RuntimeError(f"{item}: exit code {done.returncode}, {result.get('error')}\n{done.stderr[-2000:]}")
    return {name: value for name, value in result.items() if not _MEASURED.search(name)}


def without_measurements(value: object) -> object:
    """Without what differs between two runs of one commit: paths become names, measured fields go."""
    if isinstance(value, dict):
        return {k: without_measurements(v) for k, v in value.items() if not _MEASURED.search(k)}
    if isinstance(value, list):
        return [without_measurements(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(/[^/\s'\",;]+)+/", "…/", value)
    return value


PARTS: dict[str, Callable[[Inputs], Found]] = {
    "merges": merges,
    "trainings": trainings,
    "models": models,
    "operators": operators,
    "notebooks": notebooks,
}

if __name__ == "__main__":
    sys.exit(main())
