"""The type checker against the number of findings that each package still has: part of `make lint`.

    python tests/type_findings.py            fails where a package has more findings than type_findings.json allows
    python tests/type_findings.py --lower    writes the lower numbers

The checker is basedpyright in its mode "basic" (pyproject.toml), which is pyright with its node as a wheel.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = Path(__file__).with_suffix(".json")
TOOL = "basedpyright"


def findings() -> list[dict]:
    """What the checker calls errors, with `package` added. Warnings, such as optional packages that are not installed,
    do not count."""
    command = [sys.executable, "-m", TOOL, "--pythonpath", sys.executable, "--outputjson", "--project", str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{TOOL} did not run (exit code {done.returncode}): {done.stderr.strip() or done.stdout[-2000:]}")
    errors = [d for d in json.loads(done.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    for error in errors:
        error["file"] = Path(error["file"]).relative_to(ROOT).as_posix()
        error["package"] = "/".join(error["file"].split("/")[:2])
    return errors


def main() -> None:
    errors = findings()
    found, allowed = Counter(e["package"] for e in errors), Counter(json.loads(ALLOWED.read_text()))
    if more := found - allowed:
        for e in errors:
            if e["package"] in more:
                line = e["range"]["start"]["line"] + 1
                print(f"{e['file']}:{line}: {' '.join(e['message'].split())} ({e.get('rule', 'syntax')})")
        sys.exit(f"Type findings: more than {ALLOWED.relative_to(ROOT)} allows in {', '.join(sorted(more))}")
    fewer = allowed - found
    if "--lower" in sys.argv[1:]:
        ALLOWED.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
    elif fewer:
        print(f"Fewer type findings in {', '.join(sorted(fewer))}: python tests/type_findings.py --lower")
    print(f"Type findings: {found.total()}, allowed {allowed.total()}")


if __name__ == "__main__":
    main()
