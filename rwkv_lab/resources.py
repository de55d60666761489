"""Where the files lie that are not Python: kernel sources and notebooks, in a checkout and in an installed wheel."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent


def kernels_folder() -> Path:
    """Folder of the kernel sources (`cuda/*.cu`, `cpu/*.cpp`, README)."""
    return _shipped("kernels")


def notebooks_folder() -> Path:
    """Folder of the notebooks."""
    return _shipped("notebooks")


def checkout_folder() -> Path | None:
    """Root of the source checkout that is being run from, None in an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def reports_folder() -> Path:
    """Where reports go that are given no folder: `reports` in the current one, in a checkout and in a wheel alike.

    JupyterLab makes the notebook's own folder the current one. Where that is the folder of the notebooks, reports go
    to the checkout's `reports`, and of a wheel, whose notebooks lie among other packages, to that of the home folder.
    """
    here = Path.cwd()
    if here.resolve() == notebooks_folder().resolve():
        here = checkout_folder() or Path.home()
    return here / "reports"


def folder_of_variable(name: str) -> Path | None:
    """The path in an environment variable, `~` expanded; None where it is empty or not set."""
    value = os.environ.get(name)
    return Path(os.path.expanduser(value)) if value else None


def user_cache_folder() -> Path:
    """Where this package keeps what it can make again: `rwkv_lab` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    return (folder_of_variable("XDG_CACHE_HOME") or Path(os.path.expanduser("~/.cache"))) / "rwkv_lab"


def cache_of(what: str) -> Path:
    """Folder of one kind of such things, in `$RWKV_LAB_CACHE`, else in the user's cache folder."""
    return (folder_of_variable("RWKV_LAB_CACHE") or user_cache_folder()) / what


def _shipped(name: str) -> Path:
    root = checkout_folder()
    return root / name if root else _PACKAGE / name


if __name__ == "__main__":
    print(f"kernels   {kernels_folder()}\nnotebooks {notebooks_folder()}")
