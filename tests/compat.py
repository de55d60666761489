"""A short export on the oldest and newest packages that pyproject.toml allows; `make compat` runs it (10 GB of disk).

    python tests/compat.py [oldest] [newest] [keep]    both unless one is stated; ends with 1 where one fails

Each set of packages is installed into an environment of its own, `.compat/<name>`, which is removed afterwards, or
stays for the next time with `keep`. In it, a random model of each family is exported by `rwkv_lab.export.run`, which
compares onnxruntime with torch; that of Hugging Face also by the options that graphs are written in another way with.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".compat"
PINNED = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "transformers")  # whose range is tried
EXTRAS = ("export", "huggingface", "text")
SETS = ("oldest", "newest")


def requirements(which: str) -> list[str]:
    """What is installed: `oldest` has the lower bound of each of `PINNED`, `newest` the newest that pip finds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    found = []
    for line in (*project["dependencies"], *(line for line in extras if not line.startswith("rwkv_lab["))):
        name = line.split(">=")[0]
        found.append(line.replace(">=", "==") if which == "oldest" and name in PINNED else line)  # ==2.10 is 2.10.0
    return found


def try_set(which: str, keep: bool) -> dict[str, Any]:
    """Install a set, run the short form in it, and remove it."""
    folder = PLACE / which
    python = folder / "bin/python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        options = ("--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-compile", "--upgrade")
        done = _run([python, "-m", "pip", "install", *options, *requirements(which)])
        if not done.returncode:
            done = _run([python, __file__, "inside"])
        if done.returncode:
            return {"error": (done.stderr.strip() or "it ended without a message").splitlines()[-1]}
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _run(words: list[Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


# ------------------------------------------------------------------ in an environment


def inside() -> dict[str, Any]:
    """The versions that are there, and what became of each export."""
    from importlib.metadata import version

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    found: dict[str, Any] = {name: version(name) for name in PINNED}
    for name, (make, ways) in COLUMNS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = _exported(make(Path(folder)), Path(folder), ways)
            except Exception as e:  # whatever a version raises is what the table is for
                found[name] = f"{type(e).__name__}: {e}".splitlines()[0][:120]
    return found


def _rwkv(folder: Path) -> Path:
    from random_models import make_layout, write_model

    sizes = {"n_layer": 2, "n_head": 2, "head_size": 32, "dim_ffn": 96, "vocab_size": 257}
    return write_model(folder / "B.pth", make_layout("7.0", **sizes))


def _qwen3(folder: Path) -> Path:
    from causal_lm import write_model

    return write_model(folder / "base", tie_word_embeddings=True)


Ways = tuple[dict[str, Any], ...]
COLUMNS: dict[str, tuple[Callable[[Path], Path], Ways]] = {  # how a model is made, and exported
    "RWKV-7": (_rwkv, tuple({"quantization_level": level} for level in ("none", "int8", "int4"))),
    "Qwen3": (_qwen3, ({},)),
    "sdpa": (_qwen3, tuple({"attention_implementation": "sdpa", "onnx_opset_version": opset} for opset in (20, 23))),
    "legacy": (_qwen3, ({"onnx_exporter": "legacy"},)),
    "fixed sizes": (_qwen3, ({"onnx_dynamic_axes": False},)),
}


def _exported(checkpoint: Path, folder: Path, ways: Ways) -> str:
    from rwkv_lab.export import ConfigurationManager, run

    given = dict(checkpoint_path=checkpoint, output_directory=folder / "out", naming_pattern="it", export_pytorch=False)
    text = "The quick brown fox jumps over the lazy dog. " * 3
    for way in ways:
        values = given | {"test_input_samples": [text], "overwrite": True} | way
        result = run(ConfigurationManager(environment={}).resolve(**values))
        if len(result.attempts) > 1:
            return f"{way}: {result.attempts[0].error}".splitlines()[0][:120]
        rounded = way.get("quantization_level", "none") != "none"  # costs tiny models much
        if not rounded and not result.verdict.startswith(("PASS", "WARN")):
            return result.verdict
    return "passed"


def main() -> None:
    if sys.argv[1:] == ["inside"]:
        print(json.dumps(inside()))
        return
    if unknown := [word for word in sys.argv[1:] if word not in (*SETS, "keep")]:
        sys.exit(f"{unknown[0]}: there are {', '.join(SETS)} and keep")
    which = [one for one in SETS if one in sys.argv] or SETS
    rows = {one: try_set(one, "keep" in sys.argv) for one in which}
    columns = (*PINNED, *COLUMNS)
    print(f"{datetime.now(UTC):%Y-%m-%d}, Python {sys.version.split()[0]}\n")
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for one, row in rows.items():
        cells = [row["error"]] if "error" in row else [row[name] for name in columns]
        print(f"| {one} | " + " | ".join(cells) + " |")
    if any("error" in row or {row[name] for name in COLUMNS} != {"passed"} for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
