"""Python that starts at once: a process imports what notebooks and commands import, once, and others are forks of it.

    python warm_python.py SOCKET [torch]    the process that forks; with nothing imported but torch

In place of `sys.executable` tests start the file that `warm_python` yields. It asks for a fork, which becomes the
program: a process of its own with the arguments, folder, variables and streams of whoever started it.
Where a variable is another one that is read while modules are imported, and for arguments other than
`-m MODULE`, `-c CODE` and a script, perhaps after `-u`, it is a new Python as ever. A kernel of a notebook is such a
program, too.
"""

import atexit
import gc
import importlib
import json
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, NoReturn

# Read when a process starts or while modules are imported: a fork has those of its server.
FIXED = ("PYTHONPATH", "OMP_NUM_THREADS", "LD_PRELOAD", "ASAN_OPTIONS")
MORE = "WARM_PYTHON_IMPORTS"  # a variable: modules that a process wants to have imported already
# Of C modules alone, which are there at once: what Python has around them takes longer than all the rest.
_CLIENT = """#!{python} -SE
import marshal, os, sys, _signal, _socket
words, fixed, environment = sys.argv[1:], {fixed!r}, dict(os.environ)
unbuffered = words[:1] == ["-u"]
plain = words[unbuffered:]
script = bool(plain) and not plain[0].startswith("-")
if not (script or plain[:1] in (["-m"], ["-c"])) or any(environment.get(n, "") != v for n, v in fixed.items()):
    os.execv({python!r}, [{python!r}, *words])
server = _socket.socket(_socket.AF_UNIX)
server.connect({path!r})
given = dict(words=plain, unbuffered=unbuffered, environment=environment)
given |= dict(folder=os.getcwd(), parent=os.getppid(), mask=os.umask(0), program=os.path.abspath(sys.argv[0]))
message = marshal.dumps(given)
streams = b"".join(n.to_bytes(4, sys.byteorder) for n in (0, 1, 2))
server.sendmsg([len(message).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
server.sendall(message)
server.settimeout(1)
_signal.signal(_signal.SIGINT, lambda *_: server.send(b"i"))  # it is meant for the fork
while os.getppid() == given["parent"]:  # it does not outlive who started it
    try:
        code = server.recv(4)
    except TimeoutError:
        continue
    code = int.from_bytes(code, "big", signed=True) if code else 1
    if code < 0:
        if -code not in (_signal.SIGKILL, _signal.SIGSTOP):
            _signal.signal(-code, _signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
"""


class Warm(NamedTuple):
    """What makes processes start at once."""

    python: str  # in place of sys.executable
    environment: dict[str, str]  # in which the kernel python3 is such a process

    @contextmanager
    def for_children(self) -> Iterator[None]:
        """Processes that this one starts by `sys.executable`, as our own code does, are such processes."""
        names = [name for name in FIXED if name in self.environment]
        before = sys.executable, {name: os.environ.get(name) for name in names}
        sys.executable = self.python
        os.environ.update((name, self.environment[name]) for name in names)
        try:
            yield
        finally:
            sys.executable = before[0]
            for name, value in before[1].items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def warm_python(folder: Path, environment: Mapping[str, str], torch_alone: bool = False) -> Iterator[Warm]:
    """Forks for processes in this environment. `folder`: a short path, it has a socket in it.

    torch_alone: they import rwkv_lab themselves, as it is then, and do nothing less.
    """
    path, client = str(folder / "socket"), folder / "python"
    fixed = {name: environment.get(name, "") for name in FIXED}
    client.write_text(_CLIENT.format(python=sys.executable, fixed=fixed, path=path))
    client.chmod(0o755)
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [str(client), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, __file__, path, *(["torch"] if torch_alone else [])]
    with subprocess.Popen(words, env=environment, **pipes) as server:
        assert server.stdout and server.stdout.readline() == "ready\n"
        yield warm_in(folder, environment)
        assert server.stdin
        server.stdin.close()


def warm_in(folder: Path, environment: Mapping[str, str]) -> Warm:
    """What `warm_python` yields, for other processes, too."""
    return Warm(str(folder / "python"), {**environment, "JUPYTER_PATH": str(folder)})


def serve(path: str, torch_alone: bool = False) -> dict[str, Any] | None:
    """Listen on a socket, and fork for each that connects; ends with its stdin. In a fork: what it is to be."""
    forks: dict[int, socket.socket] = {}  # pid -> whoever asked for it
    with socket.socket(socket.AF_UNIX) as server, _ends_of_forks() as ended:
        server.bind(path)
        server.listen(16)
        print("ready", flush=True)
        imported = False
        while True:  # no thread: a fork has only its own
            ready = select.select([server, sys.stdin, ended, *forks.values()], [], [])[0]
            if sys.stdin in ready:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                return None
            if ended in ready:
                ended.recv(4096)
                _answer(forks)
            _pass_on(forks, ready)
            if server not in ready or (asked := _asked(server)) is None:
                continue
            given, streams, asker = asked
            if not imported:  # a run of tests that start no process takes no time for it
                _import(torch_alone)
                imported = True
            _import_more(given["environment"].get(MORE, ""))
            pid = os.fork()
            if pid == 0:
                break
            forks[pid] = asker
            for stream in streams:
                os.close(stream)
    for other in (asker, *forks.values()):
        other.close()
    _become(given, streams)
    return given


@contextmanager
def _ends_of_forks() -> Iterator[socket.socket]:
    """A socket that can be read when a fork has ended."""
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        yield reading
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)


def _answer(forks: dict[int, socket.socket]) -> None:
    """Tell the exit codes of those that have ended."""
    while forks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            break
        with forks.pop(pid) as asker, suppress(OSError):
            asker.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


def _pass_on(forks: dict[int, socket.socket], ready: list[Any]) -> None:
    """Interrupts; and a fork ends with whoever asked for it."""
    for pid, asker in forks.items():
        if asker in ready:
            interrupt = False
            with suppress(OSError):
                interrupt = bool(asker.recv(1))
            os.kill(pid, signal.SIGINT if interrupt else signal.SIGKILL)


def _import_more(names: str) -> None:
    """What those import that ask for it, once; names of modules that are not there mean nothing."""
    gc.disable()
    for name in names.split():
        if name not in sys.modules:
            with suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()
    gc.enable()


def _import(torch_alone: bool) -> None:
    gc.disable()
    if torch_alone:
        import torch  # noqa: F401
    else:
        _import_what_notebooks_do()
    gc.freeze()  # a collection in a fork would copy its memory
    gc.enable()


def _import_what_notebooks_do() -> None:
    # As rwkv_lab.workbench.batch: it checks what no notebook holds, and its import takes a second.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import ipykernel.kernelapp  # noqa: F401
    import ipywidgets  # noqa: F401
    import papermill.cli  # noqa: F401
    import torch._dynamo  # noqa: F401  what torch imports when an operator of ours runs for the first time

    from rwkv_lab import plotting  # noqa: F401
    from rwkv_lab.workbench import panel  # noqa: F401
    from rwkv_lab.workbench.registry import cells_of, notebook_names

    for name in notebook_names():
        cells_of(name)
    do_less()


# What takes long and shows nothing more: large pictures, long answers, long texts that are compared, rates that are
# measured for more than a moment or again where others disturbed it.
LESS = {
    "rwkv_lab.plotting._DPI": 36,
    "rwkv_lab.analysis.behaviour._SAMPLE": 10,
    "rwkv_lab.train.data._MAX_HELD_OUT": 4096,
    "rwkv_lab.train.samples._LENGTH": 20,
    "rwkv_lab.workbench.estimate._MEASURED": 0.005,
    "rwkv_lab.bench.comparison._AGAIN": 0,
    "rwkv_lab.bench.machine._READ_BYTES": 1 << 22,
    "rwkv_lab.bench.engines.decoder.__defaults__": (0.02,),  # seconds of a sample
}
IN_FULL: dict[str, Any] = {}  # what was there before


def do_less() -> None:
    """Have LESS here, and no file that waits for the disk. Processes that start as users do have all of it."""
    from rwkv_lab.analysis import behaviour

    for name, value in LESS.items():
        where, _, attribute = name.rpartition(".")
        IN_FULL[name] = getattr(resolve_name(where), attribute)
        setattr(resolve_name(where), attribute, value)
    measure = IN_FULL["rwkv_lab.analysis.behaviour.measure_held_out"] = behaviour.measure_held_out
    behaviour.measure_held_out = lambda *given, most=None: measure(*given, most=most or 2000)
    os.fsync = os.fdatasync = lambda fd: None


def _asked(server: socket.socket) -> tuple[dict[str, Any], list[int], socket.socket] | None:
    """What a process is to be, its streams, and whoever asked; None where that one has ended."""
    asker, _ = server.accept()
    try:
        return *_read(asker), asker
    except (OSError, ValueError, EOFError):
        asker.close()
        return None


def _read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    size, message = int.from_bytes(header, "big"), b""
    while len(message) < size and (some := connection.recv(1 << 20)):
        message += some
    return marshal.loads(message), streams


def _become(given: dict[str, Any], streams: list[int]) -> None:
    """Take over streams, variables and folder."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    before = _of_the_hub()
    os.environ.clear()
    os.environ.update(given["environment"])
    if _of_the_hub() != before:  # the package reads them while it is imported, which a process before may have had done
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
    os.chdir(given["folder"])
    os.umask(given["mask"])
    sys.executable = given["program"]  # what it starts, starts at once, too
    if given["unbuffered"]:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]


def _of_the_hub() -> dict[str, str]:
    """The variables of huggingface_hub."""
    return {name: value for name, value in os.environ.items() if name.startswith("HF_")}


def run(words: list[str], parent: int) -> None:
    """As `python WORDS…`."""
    import runpy

    if words[:2] == ["-m", "ipykernel_launcher"]:
        _be_kernel(words[2:], parent)
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # or runpy warns that it is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent.absolute())
        runpy.run_path(words[0], run_name="__main__")


def _be_kernel(arguments: list[str], parent: int) -> None:
    os.getppid = lambda: parent  # that of every other kernel
    # It ends with whoever asked for it instead of its parent.
    sys.argv = ["ipykernel_launcher", *arguments, "--IPKernelApp.parent_handle=1"]
    import ipywidgets
    from ipykernel import kernelapp

    ipywidgets.register_comm_target()  # what its import does in a kernel
    kernelapp.launch_new_instance()
    sys.stdout.flush()
    os._exit(0)


def _end(code: object) -> NoReturn:
    """As Python ends, without taking apart what the server imported, which takes a second."""
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code & 0xFF if isinstance(code, int) else 1)


if __name__ == "__main__" and (given := serve(sys.argv[1], sys.argv[2:] == ["torch"])):
    try:
        run(given["words"], given["parent"])
    except SystemExit as e:
        _end(e.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        _end(130)
    except Exception:
        traceback.print_exc()
        _end(1)
    _end(0)
