"""Python that starts at once does what `sys.executable` does."""

import signal
import subprocess
import sys

import pytest

SHOWS = """
import os, sys
print(sys.argv, os.getcwd(), __name__, sys.path[0], os.environ["WORD"], sys.stdin.read())
print("wrong", file=sys.stderr)
"""
ENDS = {
    "pass": 0,
    "import sys; sys.exit(3)": 3,
    "import sys; sys.exit('a text')": 1,
    "1 / 0": 1,
    "import os; os.kill(os.getpid(), 9)": -9,
    "import atexit; atexit.register(open, 'at-exit', 'w')": 0,
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), open('late', 'w'))).start()": 0,
}


@pytest.fixture
def both(warm, tmp_path):
    """both(words) -> what is to be seen of it, by sys.executable and by the other one."""

    def run(*words, **variables) -> list:
        found = []
        for python in (sys.executable, warm.python):
            done = subprocess.run(
                [python, *words],
                cwd=tmp_path,
                env={**warm.environment, **variables},
                input="given",
                capture_output=True,
                text=True,
                timeout=60,
            )
            found.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
        return found

    return run


def test_arguments_folder_variables_and_streams(both, tmp_path):
    (tmp_path / "shows.py").write_text(SHOWS)
    for words in (["-c", SHOWS], ["-u", "-m", "shows"], [str(tmp_path / "shows.py")]):
        one, other = both(*words, "a", "--b", WORD="c d")
        assert one == other and one[0] == 0 and "c d given" in one[1] and one[2] == ["wrong"]


@pytest.mark.parametrize("code", ENDS)
def test_ends(code, both, tmp_path):
    one, other = both("-c", code)
    assert one == other and one[0] == ENDS[code]
    assert not ("at-exit" in code or "late" in code) or list(tmp_path.iterdir())


def test_an_interrupt_reaches_it(warm):
    # Many short sleeps: a signal that comes just before a sleep begins does not end it.
    wait = "[time.sleep(0.1) for _ in range(600)]"
    code = f"import time\ntry: print('on', flush=True), {wait}\nexcept KeyboardInterrupt: print('interrupted')"
    given = {"env": warm.environment | {"WORD": ""}, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([warm.python, "-c", code], **given) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n" and process.returncode == 0


def test_what_is_imported_already_is_not_taken_where_it_could_differ(both, warm, tmp_path):
    code = "import sys; print('torch' in sys.modules)"
    assert [found[1] for found in both("-c", code)] == ["False\n", "True\n"]
    for words, variables in ((["-I", "-c", code], {}), (["-c", code], {"PYTHONPATH": str(tmp_path)})):
        assert [found[1] for found in both(*words, **variables)] == ["False\n"] * 2


def test_it_ends_with_whoever_asked_for_it(warm, tmp_path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen(
        [warm.python, "-c", code], env=warm.environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline()
        process.kill()
        assert process.stdout.read() == ""  # ends with the last who could write
