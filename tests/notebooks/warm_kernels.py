"""Kernels that start at once: a process imports what notebooks import, once, and every kernel is a fork of it.

    python warm_kernels.py serve SOCKET    the process that forks
    python warm_kernels.py SOCKET PYTHONPATH ARGUMENTS…    what the kernel spec says; it and its kernel end together

Each kernel is still a process of its own, with the folder, variables, stdout and stderr of whoever starts it. With
another PYTHONPATH than the server's it is started as ever.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_SAME = "PYTHONPATH"  # of the server and a kernel, or they would not import the same files


def serve(path: str) -> None:
    """Listen on a socket, and fork a kernel for each that connects; ends with its stdin."""
    import ipykernel.kernelapp  # noqa: F401
    import ipywidgets  # noqa: F401

    from rwkv_lab.workbench import panel  # noqa: F401
    from rwkv_lab.workbench.registry import cells_of, notebook_names

    for name in notebook_names():
        cells_of(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)
    print("ready", flush=True)
    while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:  # no thread: a fork has only its own
        connection, _ = server.accept()
        _reap()
        if os.fork() == 0:
            server.close()
            _be_kernel(connection)
        connection.close()
    _reap()


def _reap() -> None:
    """Take leave of kernels that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _be_kernel(connection: socket.socket) -> None:
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    given = json.loads(message)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    os.getppid = lambda: given["parent"]  # that of every other kernel
    # It ends with the connection instead of its parent.
    sys.argv = ["ipykernel_launcher", *given["arguments"], "--IPKernelApp.parent_handle=1"]
    threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()
    sys.stdout.flush()
    os._exit(0)


def _start(path: str, arguments: list[str]) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    given = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "parent": os.getppid()}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is meant for the kernel
    socket.send_fds(connection, [json.dumps(given).encode()], [0, 1, 2])
    parent = os.getppid()
    connection.settimeout(1)
    while os.getppid() == parent:  # a kernel does not outlive who started it
        with suppress(TimeoutError):
            connection.recv(1)
            return


@contextmanager
def warm_kernels(folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which the kernel python3 is a fork of a process that has this one."""
    path = str(folder / "socket")
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, __file__, path, environment.get(_SAME, ""), "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__, "serve", path], env=environment, **pipes) as server:
        assert server.stdout.readline() == "ready\n"
        yield {**environment, "JUPYTER_PATH": str(folder)}
        server.stdin.close()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        socket_path, python_path, *rest = sys.argv[1:]
        if os.environ.get(_SAME, "") != python_path:
            os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", *rest])
        _start(socket_path, rest)
