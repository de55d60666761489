"""The layers: a package imports only packages below it, nothing in a circle, no private name of another package."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From top to bottom; packages of one row do not import each other. The modules of the last row may.
LAYERS = (
    {"cli"},
    {"doctor"},
    {"workbench"},
    {"analysis"},
    {"bench"},
    {""},  # rwkv_lab/__init__.py
    {"export"},
    {"merge", "train", "convert"},
    {"peft"},
    {"model"},
    {"checkpoint", "tokenizer"},
    {"wkv"},
    {
        "dtypes",
        "arguments",
        "command_line",
        "errors",
        "lazy_names",
        "lazy_numpy",
        "lazy_torch",
        "progress",
        "checks",
        "machine",
        "spec",
        "suggestions",
        "patterns",
        "names",
        "paths",
        "resources",
        "torch_private",
        "version",
        "plotting",
        "samples",
        "sigterm",
        "text",
        "threads",
        "yaml_file",
    },
)
BOTTOM = LAYERS[-1]
# What is still wrong. Lines only go.
KNOWN: set[str] = set()


def modules(folder: Path) -> dict[str, ast.Module]:
    """The syntax trees of a package's modules by dotted name; a package's name is that of its `__init__`."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return trees


def imports(name: str, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """(module, name in it or "") of all imports in module `name` from its own project, also inside functions."""
    root = name.split(".")[0]
    is_package = any(other.startswith(name + ".") for other in trees)
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == root:
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = name.split(".")
                source = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [source])])
            for alias in node.names if source.split(".")[0] == root else ():
                inner = f"{source}.{alias.name}"
                yield (inner, "") if inner in trees else (source, alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = str(node.args[0].value)
            if called in ("import_module", "__import__") and target.split(".")[0] == root:
                yield target, ""


def package_of(module: str) -> str:
    """`merge` for `rwkv_lab.merge.plan`, "" for `rwkv_lab` itself."""
    return module.split(".")[1] if "." in module else ""


def level(package: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def upward(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    """Imports of a package that is not below."""
    for name in trees:
        own = package_of(name)
        for target, _ in imports(name, trees):
            other = package_of(target)
            if other != own and level(other) <= level(own) and not (own in BOTTOM and other in BOTTOM):
                yield f"{name} imports {target}, which is not below it"


def private(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    """Private names (`_x`) of another package: imported, or used as an attribute of an imported module."""
    for name, tree in trees.items():
        aliases = {}
        for target, imported in imports(name, trees):
            if package_of(target) == package_of(name):
                continue
            parts = [*target.split(".")[1:], imported]
            if any(part.startswith("_") and not part.startswith("__") for part in parts):
                yield f"{name} imports the private {target}.{imported}"
            aliases[target.rpartition(".")[2]] = target
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    yield f"{name} uses the private {aliases[node.value.id]}.{node.attr}"


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            new = arrows.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    reach = {node: reached(node) for node in arrows}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in arrows if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def module_circles(trees: Mapping[str, ast.Module]) -> list[str]:
    arrows = {name: {target for target, _ in imports(name, trees)} - {name} for name in trees}
    return [f"in a circle: {', '.join(group)}" for group in circles(arrows)]


def test_imports_go_downward_only():
    trees = modules(ROOT / "rwkv_lab")
    wrong = {*upward(trees), *private(trees), *module_circles(trees)}
    assert not wrong - KNOWN, "\n".join(sorted(wrong - KNOWN))


def test_every_package_has_its_layer():
    packages = {package_of(name) for name in modules(ROOT / "rwkv_lab")} - {""}
    assert packages <= set().union(*LAYERS), "a new package: give it a place in LAYERS"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"merge/a.py": "from rwkv_lab import bench"}, "rwkv_lab.merge.a imports rwkv_lab.bench"),
        ({"merge/a.py": "def f():\n    import rwkv_lab.train.b"}, "rwkv_lab.merge.a imports rwkv_lab.train.b"),
        ({"model/a.py": "from rwkv_lab import __version__"}, "rwkv_lab.model.a imports rwkv_lab,"),
        ({"wkv/a.py": "from ..model import b"}, "rwkv_lab.wkv.a imports rwkv_lab.model.b"),
        ({"wkv/a.py": "import_module('rwkv_lab.model')"}, "rwkv_lab.wkv.a imports rwkv_lab.model"),
        ({"model/a.py": "from rwkv_lab.wkv.b import _c"}, "private rwkv_lab.wkv.b._c"),
        ({"model/a.py": "from rwkv_lab.wkv import b\nb._c()"}, "private rwkv_lab.wkv.b._c"),
        ({"wkv/a.py": "from rwkv_lab.wkv import b", "wkv/b.py": "def f():\n    from . import a"}, "in a circle"),
        ({"model/a.py": "from rwkv_lab.wkv.b import c"}, None),
        ({"errors.py": "from rwkv_lab import paths"}, None),
    ],
)
def test_what_is_wrong_is_found(files, expected, tmp_path):
    for name in ("merge/__init__.py", "bench/__init__.py", "train/b.py", "model/b.py", "wkv/b.py", "paths.py"):
        (tmp_path / "rwkv_lab" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rwkv_lab" / name).touch()
    (tmp_path / "rwkv_lab/__init__.py").touch()
    (tmp_path / "rwkv_lab/wkv/__init__.py").touch()
    (tmp_path / "rwkv_lab/model/__init__.py").touch()
    for name, text in files.items():
        (tmp_path / "rwkv_lab" / name).write_text(text)
    trees = modules(tmp_path / "rwkv_lab")
    wrong = [*upward(trees), *private(trees), *module_circles(trees)]
    assert any(expected in line for line in wrong) if expected else not wrong, wrong
