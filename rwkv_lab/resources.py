"""Where the files lie that are not Python: kernel sources and notebooks, in a checkout and in an installed wheel."""

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


def _shipped(name: str) -> Path:
    root = checkout_folder()
    return root / name if root else _PACKAGE / name


if __name__ == "__main__":
    print(f"kernels   {kernels_folder()}\nnotebooks {notebooks_folder()}")
