"""One attempt to write something, in a process of its own: a crash, a kill and a hang are errors like any other.

What writes is stated by name, `module:function`. It is called with the settings, the path of the folder to write, and
keywords; JSON has to hold these and what it returns. The process ends when the one that started it does.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_lab import errors
from rwkv_lab.errors import ONNXExportError, RwkvLabError
from rwkv_lab.export.diagnosis import Settings

_LONGEST = 20_000  # characters of an error's text
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Work:
    """What an attempt calls: `function` is "module:name"."""

    function: str
    keywords: dict[str, Any] = field(default_factory=dict)


@dataclass
class Attempt:
    """One try, as it stands in result.json.

    why: it was made: "as asked for", or the cause of the error before it.
    error: class and message, None where it succeeded.
    diagnosis: the cause that its error was recognised by; None where it is not known.
    lost: what its result lacks of what was asked for.
    """

    settings: Settings
    why: str
    seconds: float = 0.0
    error: str | None = None
    diagnosis: str | None = None
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """What the work of an attempt returned."""

    value: Any


@dataclass(frozen=True)
class Fault:
    """How an attempt failed: the error that is raised if nothing helps, and all that its process said of it."""

    error: RwkvLabError
    text: str


def try_once(work: Work, settings: Settings, folder: Path, why: str, limit: float) -> tuple[Attempt, Answer | Fault]:
    """Do it once.

    Args:
        folder: is written by `work`; of a failed attempt nothing is left there.
        limit: seconds after which the process is killed.
    """
    attempt = Attempt(dict(settings), why)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rwkv_lab-attempt-") as place:
        came = _in_process(work, settings, folder, Path(place), limit)
    attempt.seconds = round(time.perf_counter() - start, 3)
    if isinstance(came, Fault):
        shutil.rmtree(folder, ignore_errors=True)
        attempt.error = f"{type(came.error).__name__}: {came.error}"
    return attempt, came


def _in_process(work: Work, settings: Settings, folder: Path, place: Path, limit: float) -> Answer | Fault:
    request = {"function": work.function, "keywords": work.keywords, "settings": settings, "folder": str(folder)}
    request |= {"path": sys.path, "answer": str(place / "answer.json")}
    (place / "request.json").write_text(json.dumps(request))
    said = place / "said.txt"
    with said.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(place / "request.json")],
            stdin=subprocess.PIPE,  # closes when this process ends, however it does
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return _fault(f"it did not end within {limit:g} seconds, its attempt_time_limit", said)
        finally:
            _end(process)
    answer = place / "answer.json"
    if not answer.exists():
        how = f"was killed by signal {-code} ({_signal(-code)})" if code < 0 else f"ended with exit code {code}"
        return _fault(f"the process that wrote it {how}", said)
    found = json.loads(answer.read_text())
    if "value" in found:
        return Answer(found["value"])
    kind = getattr(errors, found["kind"], None) if found["ours"] else None
    message = found["message"] if kind else f"{found['kind']}: {found['message']}"
    return Fault((kind or ONNXExportError)(message), found["text"])


# Modules are looked for where this process looks for them, rwkv_lab itself too.
_START = """
import json, sys
sys.path[:] = json.loads(open(sys.argv[1]).read())["path"]
from rwkv_lab.export.attempt import answer
answer(sys.argv[1])
"""


def _fault(what: str, said: Path) -> Fault:
    last = said.read_text(errors="replace")[-_LONGEST:]
    return Fault(ONNXExportError(f"The model cannot be written as ONNX: {what}."), f"{what}\n{last}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _end(process: subprocess.Popen) -> None:
    """End a process and those it started, as they are one group."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    if process.stdin:
        process.stdin.close()


# ------------------------------------------------------------------ in the process


def answer(path: str) -> None:
    """Do what a request asks for, and write the answer; called in the process of an attempt."""
    request = json.loads(Path(path).read_text())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, name = request["function"].split(":")
    try:
        function = getattr(importlib.import_module(module), name)
        value = function(request["settings"], Path(request["folder"]), **request["keywords"])
        text = json.dumps({"value": value})
    except Exception as e:  # whatever it is, the process that asked is told
        ours = isinstance(e, RwkvLabError)
        lines = [line for line in _plain(e).splitlines() if line.strip()]
        message = _plain(e) if ours else (lines[-1][:300] if lines else "without a message")
        text = json.dumps({"kind": type(e).__name__, "ours": ours, "message": message, "text": all_text(e)})
    whole = Path(request["answer"])
    whole.with_suffix(".part").write_text(text)
    whole.with_suffix(".part").rename(whole)


def _end_with_parent() -> None:
    """Wait until the process that started this one is gone."""
    sys.stdin.buffer.read()
    os._exit(1)


def all_text(error: BaseException) -> str:
    """Classes and messages of an error and of those that it came from, without the lines of code they passed."""
    texts: list[str] = []
    following: BaseException | None = error
    while following is not None and len(texts) < 10:
        texts.append(f"{type(following).__name__}: {_plain(following)}"[:_LONGEST])
        following = following.__cause__ or following.__context__
    return "\n".join(texts)


def _plain(error: BaseException) -> str:
    return _COLOURS.sub("", str(error))
