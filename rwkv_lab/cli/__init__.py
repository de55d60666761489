"""The command `rwkv-lab`: runs notebooks without JupyterLab, many of them, and shows what became of them.

Start time matters here: what a command needs is imported when it runs, torch first of all.
"""

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

from rwkv_lab.cli import notebooks
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.sigterm import sigterm_cleans_up
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.version import __version__

_NOTES = """\
A run ends with its verdict and the path of its report. Exit codes: 0 the run is ok, 1 it was refused or a check failed,
2 the command line is wrong, 130 stopped by Ctrl-C, 143 by SIGTERM.
Completion of commands and parameters: eval "$(rwkv-lab completion bash)"
"""

_SWEEPS = """\
GRID.yaml has grid (parameter: list of values; every combination is a run), runs (a list), or random with draws; \
fixed; and minimise and maximise, names of metrics.

A sweep that was stopped goes on where the same command is given again."""


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code.

    Args:
        words: without the name of the command; those of this process where None is given.
    """
    words = sys.argv[1:] if words is None else words
    completed = os.environ.get("COMP_LINE", "") if "_ARGCOMPLETE" in os.environ else ""
    parser, commands = _parser([*words, *completed.split()])
    _complete(parser)
    if words and not words[0].startswith("-") and words[0] not in commands:
        near = did_you_mean(words[0], commands) or f"; there are: {', '.join(commands)}"
        parser.error(f"there is no command {words[0]!r}{near}")
    given, others = parser.parse_known_args(words)
    if others and not hasattr(given, "words"):
        options = re.findall(r"--[\w-]+", commands[words[0]].format_help())
        parser.error(f"no such option: {' '.join(others)}{did_you_mean(others[0], options)}")
    if others:
        given.words = [*others, *given.words]  # said to be no parameters, in words that help
    if given.work not in (_list, _completion) and not _has_current_folder():
        print("The current folder has been deleted: change to another one.", file=sys.stderr)
        return 1
    try:
        with sigterm_cleans_up():
            return given.work(given)
    except RwkvLabError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rwkv-lab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """That of the command line, and those of its commands by name; what takes long to describe is described for the
    commands that are among the words."""
    parser = argparse.ArgumentParser(
        "rwkv-lab", description="A workbench for RWKV language models.", epilog=_NOTES, formatter_class=_Plain
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(work=_help(parser))
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, work: Callable[[argparse.Namespace], int], help: str, more: str = "") -> argparse.ArgumentParser:
        about = "\n\n".join(textwrap.fill(text, 116) for text in (help, *more.split("\n\n")))
        one = commands.add_parser(name, help=help, description=about.strip(), formatter_class=_Plain)
        one.set_defaults(work=work)
        return one

    run = add("run", _run, "Run a notebook.", "Its parameters: rwkv-lab NOTEBOOK --help.")
    run.add_argument("notebook", metavar="NOTEBOOK", help="a name that `rwkv-lab list` shows, or a path")
    _add_words(run, None)
    for name in notebooks.names():
        _add_notebook(add, name, words)
    add("list", _list, "List the notebooks, and what they are for.")
    _add_others(add, words)
    return parser, commands.choices


def _add_notebook(add: Callable[..., argparse.ArgumentParser], name: str, words: Sequence[str]) -> None:
    """The short form of `run` for a notebook."""
    book = notebooks.notebook(name)
    files = "\n\nWith paths in place of parameters it says at once what the files are, from headers alone."
    more = book.purpose + (files if name == "inspect" else "")
    one = add(name, _run, book.title if book.title.endswith("?") else f"{book.title}.", more.replace("%", "%%"))
    if name in words:
        from rwkv_lab.cli.words import described

        one.epilog = described(book).replace("%", "%%")
    one.set_defaults(notebook=name)
    if name == "inspect":
        one.add_argument("--all", action="store_true", help="of files: list every tensor")
    _add_words(one, name)


def _add_words(parser: argparse.ArgumentParser, name: str | None) -> None:
    words = parser.add_argument(
        "words", metavar="NAME=VALUE", nargs="*", default=[], help="a parameter of the notebook"
    )
    words.completer = _Names(name)  # type: ignore[attr-defined]  # where argcomplete looks


def _add_others(add: Callable[..., argparse.ArgumentParser], words: Sequence[str]) -> None:
    sweep = add("sweep", _sweep, "Run a notebook many times, and summarise what came out.", _SWEEPS)
    sweep.add_argument("notebook", metavar="NOTEBOOK", help="a name that `rwkv-lab list` shows, or its path")
    sweep.add_argument("grid", metavar="GRID.yaml", help="what the runs differ in")
    if "sweep" in words:
        from rwkv_lab.command_line import add_flags
        from rwkv_lab.workbench.sweep.spec import SweepOptions

        add_flags(sweep, SweepOptions.model_fields)
    report = add("report", _report, "Show what became of runs.", "Without a folder: lists those below reports/.")
    report.add_argument("folder", nargs="?", help="of a run, or one with runs below it; or a notebook's name")
    report.add_argument("--open", action="store_true", help="open the report, or the list, in a browser")
    add("doctor", _doctor, "Say what works on this machine, and what to do about the rest.")
    completion = add("completion", _completion, "Print what a shell needs to complete commands.")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _run(given: argparse.Namespace) -> int:
    from rwkv_lab.cli.running import run_notebook

    if given.notebook == "inspect" and given.words and not any("=" in word for word in given.words):
        from rwkv_lab.cli.inspecting import show_files

        return show_files(given.words, every_tensor=getattr(given, "all", False))
    return run_notebook(notebooks.notebook(given.notebook), given.words)


def _list(given: argparse.Namespace) -> int:
    for name in notebooks.names():
        book = notebooks.notebook(name)
        purpose = textwrap.indent(textwrap.fill(book.purpose, 105), " " * 11)
        print(f"{name:<10} {book.title}\n{purpose}\n")
    print("Run one by its name: rwkv-lab merge base=B.pth tuned=T.pth out=O.pth; its parameters: rwkv-lab merge --help")
    return 0


def _sweep(given: argparse.Namespace) -> int:
    from rwkv_lab.cli.sweeping import run_sweep

    return run_sweep(vars(given))


def _report(given: argparse.Namespace) -> int:
    from rwkv_lab.cli.reports import show_report

    return show_report(given.folder, given.open)


def _doctor(given: argparse.Namespace) -> int:
    from rwkv_lab.doctor import examine

    findings = examine()
    for one in findings:
        print(one)
    return 1 if any(one.state == "FAIL" for one in findings) else 0


def _completion(given: argparse.Namespace) -> int:
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        print("argcomplete is not installed; pip install 'rwkv_lab[workbench]' brings it.", file=sys.stderr)
        return 1
    print(shellcode(["rwkv-lab"], shell=given.shell))
    return 0


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions; ends the process then."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    from argcomplete import autocomplete

    autocomplete(parser)


class _Names:
    """Completes the parameters of a notebook: of `run` that of the word before, else the command's own."""

    def __init__(self, notebook: str | None):
        self.notebook = notebook

    def __call__(self, prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
        given = self.notebook or parsed_args.notebook
        return [f"{name}=" for name in notebooks.notebook(given).parameters if name.startswith(prefix)]


def _help(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """What is done without a command."""

    def show(given: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    return show


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions as they are, on 120 columns at most."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=24, width=116)
