"""Other implementations in the same run: the PyPI package `rwkv`, llama.cpp by `llama-cpp-python`, and any other one by
a command of the user's.

A peer gets requests of three kinds, each with token ids of which the first `read` are read at once:

* `answers`: feed the others one by one, and write the logits after the first `read` and after each of the others,
  `[1 + others, V]` float32, to a `.npy` file;
* `decode`: the same without writing; the seconds of the part after the first `read` count;
* `prefill`: read all at once; the seconds count.

The reply is `{"seconds": …}`, or `{"error": "…"}`. A command is run once per request: its last line on stdout is the
reply. In its words these are replaced: `{task}`, `{model}` (path of the checkpoint), `{dtype}` (fp32, bf16, …),
`{tokens}` (path of a JSON list), `{read}`, `{out}` (path of the `.npy`), `{threads}`.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rwkv_lab.arguments import checked
from rwkv_lab.bench.comparison import OURS
from rwkv_lab.bench.llama_cpp_package import GGUF_TYPES
from rwkv_lab.bench.machine import child_environment, package_version
from rwkv_lab.errors import ParameterError, RwkvLabError
from rwkv_lab.lazy_numpy import np
from rwkv_lab.lazy_torch import torch

RWKV, LLAMA, AUTO = "rwkv", "llama.cpp", "auto"
_MODULES = {RWKV: "rwkv", LLAMA: "llama_cpp"}
_DISTRIBUTIONS = {RWKV: "rwkv", LLAMA: "llama-cpp-python"}
_DTYPES = {RWKV: ("bf16", "fp32"), LLAMA: tuple(GGUF_TYPES)}
_NEEDED = ("{task}", "{model}", "{tokens}", "{out}")
_TIMEOUT = 1800  # seconds for one request
_SHORTEST = 1e-9  # seconds


class PeerError(RwkvLabError):
    """A peer does not run here, or not this model; its rows give the reason, and the others are measured."""


@dataclass(frozen=True)
class Peer:
    """One implementation: a name, and the package, or else the command, that answers requests."""

    name: str
    command: str = ""
    package: str = RWKV  # where there is no command

    def runs(self, dtype: str) -> bool:
        """Whether it computes in this dtype at all."""
        return bool(self.command) or dtype in _DTYPES[self.package]


@checked
def parse_peers(wanted: Sequence[str]) -> list[Peer]:
    """Peers from texts: "auto" (`rwkv` where it is installed), "rwkv", "llama.cpp", or "name=command".

    Raises:
        ParameterError: an unknown name without a command, a command that has no place for what it needs or is no
            command line, or a name that is ours or another peer's.
    """
    there = {name: importlib.util.find_spec(module) is not None for name, module in _MODULES.items()}
    known = [RWKV if text == AUTO else text for text in wanted if text != AUTO or there[RWKV]]
    found = []
    for text in dict.fromkeys(known):
        name, equals, command = text.partition("=")
        name, command = name.strip(), command.strip()
        if not equals and name not in _MODULES:
            raise ParameterError(f"peers: {text!r} is none of {AUTO!r}, {RWKV!r}, {LLAMA!r} and 'name=command'.")
        missing = [place for place in _NEEDED if place not in command]
        if equals and (not name or missing):
            raise ParameterError(f"peers: {text!r} needs a name, and {', '.join(_NEEDED)} in its command.")
        try:
            shlex.split(command)
        except ValueError:
            raise ParameterError(f"peers: {text!r} has a quote that is not closed; close it.") from None
        if not equals and not there[name]:
            package = _DISTRIBUTIONS[name]
            raise ParameterError(f"peers: the package {package} is not installed; pip install {package}")
        peer = Peer(name, command) if equals else Peer(f"{name} {package_version(_DISTRIBUTIONS[name])}", package=name)
        if peer.name in (OURS, *(other.name for other in found)):  # rows and entries go by their names
            raise ParameterError(f"peers: the name {peer.name!r} is taken; give {text!r} another one.")
        found.append(peer)
    return found


@dataclass
class Session:
    """A peer with a model loaded. `ask` sends one request."""

    ask: Callable[[dict], dict]
    loaded: dict = field(default_factory=dict)  # "seconds" and "peak" of loading, where the peer reports them

    def answers(self, tokens: Sequence[int], read: int, vocab_size: int) -> torch.Tensor:
        """Logits `[1 + len(tokens) - read, V]` in a floating dtype."""
        shape = [1 + len(tokens) - read, vocab_size]
        with tempfile.TemporaryDirectory(prefix="rwkv_lab-peer-") as folder:
            out = str(Path(folder) / "logits.npy")
            self.ask({"task": "answers", "tokens": list(tokens), "read": read, "out": out})
            try:
                with open(out, "rb") as file:  # NumPy leaves one open that it opened itself and cannot read
                    logits = torch.from_numpy(np.load(file, allow_pickle=False))
            except Exception as e:  # NumPy has many exceptions for a file that is not its own
                raise PeerError(f"it wrote no logits: {_one_line(e)}") from e
        if list(logits.shape) != shape or not logits.is_floating_point():
            raise PeerError(f"its logits are {list(logits.shape)} of {logits.dtype}; {shape} of float32 are expected")
        return logits

    def seconds(self, task: str, tokens: Sequence[int], read: int) -> float:
        """Time of a "decode" of `tokens[read:]` or of a "prefill"."""
        found = self.ask({"task": task, "tokens": list(tokens), "read": read, "out": ""}).get("seconds")
        if isinstance(found, bool) or not isinstance(found, int | float) or not _SHORTEST < found <= _TIMEOUT:
            raise PeerError(f"its reply to {task} has no seconds that can be: {_one_line(found)}")
        return float(found)


@contextmanager
def open_peer(peer: Peer, path: Path, dtype: str) -> Iterator[Session]:
    """A peer with this checkpoint.

    Raises:
        PeerError: it cannot run this file, or ended.
    """
    if peer.command:
        yield Session(lambda request: _run_command(peer, path, dtype, request))
        return
    if peer.package == LLAMA:
        with tempfile.TemporaryDirectory(prefix="rwkv_lab-peer-") as folder:
            model = _converted(path, Path(folder) / "model.gguf", GGUF_TYPES[dtype])
            with _process("rwkv_lab.bench.llama_cpp_package", {}) as ask:
                yield Session(ask, ask({"model": str(model), "threads": torch.get_num_threads()}))
        return
    if path.suffix != ".pth":
        raise PeerError(f"it reads .pth files, not {path.name}")
    with _process("rwkv_lab.bench.rwkv_package", _switches(path)) as ask:
        # RWKV-7's part of the package puts the suffix on by itself; the other part accepts both.
        yield Session(ask, ask({"model": str(path.with_suffix("")), "dtype": dtype}))


def _converted(path: Path, out: Path, dtype: str) -> Path:
    """A GGUF file of this checkpoint.

    Raises:
        PeerError: there is none of such a model.
    """
    from rwkv_lab.convert import convert

    try:
        return Path(convert(path, "gguf", out, dtype=dtype).out)
    except RwkvLabError as e:
        raise PeerError(_one_line(e)) from e


@contextmanager
def _process(module: str, environment: dict[str, str]) -> Iterator[Callable[[dict], dict]]:
    """What asks a process that answers requests line by line, and runs as long as the block."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors_of_peer:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_of_peer,
            text=True,
            errors="replace",
            env=child_environment() | environment,
        )

        def ask(request: dict) -> dict:
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except OSError:
                reply = ""
            if not reply:
                errors_of_peer.seek(0)
                raise PeerError(f"it ended: {_one_line(_last_line(errors_of_peer.read()))}")
            return _checked(reply)

        try:
            yield ask
        finally:
            with suppress(OSError):  # it has ended, and did not read its last request
                process.stdin.close()
            process.terminate()
            process.wait()
            process.stdout.close()


def _switches(path: Path) -> dict[str, str]:
    from rwkv_lab.checkpoint import open_checkpoint

    with open_checkpoint(path) as ck:
        seven = ck.layout is not None and ck.layout.version == "7.0"
    return {"RWKV_V7_ON": str(int(seven)), "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}


def _run_command(peer: Peer, path: Path, dtype: str, request: dict) -> dict:
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-peer-") as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(request["tokens"]))
        values = {"task": request["task"], "model": path, "dtype": dtype, "tokens": tokens, "read": request["read"]}
        values |= {"out": request["out"], "threads": torch.get_num_threads()}
        words = shlex.split(peer.command)
        for name, value in values.items():
            words = [word.replace(f"{{{name}}}", str(value)) for word in words]
        try:
            output = {"capture_output": True, "text": True, "errors": "replace"}
            done = subprocess.run(words, **output, env=child_environment(), timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as e:
            raise PeerError(f"its command is not done after {_TIMEOUT} s") from e
        except (OSError, ValueError) as e:  # a ValueError is of words that no system takes
            raise PeerError(f"its command does not run: {_one_line(e)}") from e
    if done.returncode:
        raise PeerError(f"its command ended with code {done.returncode}: {_one_line(_last_line(done.stderr))}")
    return _checked(_last_line(done.stdout))


def _checked(line: str) -> dict:
    """A reply that is an object and holds no error."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise PeerError(f"its last line is no JSON: {_one_line(line)}") from e
    if not isinstance(reply, dict):
        raise PeerError(f"its reply is no JSON object: {_one_line(line)}")
    if "error" in reply:
        raise PeerError(_one_line(reply["error"]) if reply["error"] else "it failed without a reason")
    return reply


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _one_line(text: object) -> str:
    """Text of a peer, in one line, short, and valid as UTF-8."""
    return " ".join(str(text).encode(errors="replace").decode().split())[:200] or "no message"
