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


def _shipped(name: str) -> Path:
    root = checkout_folder()
    return root / name if root else _PACKAGE / name


if __name__ == "__main__":
    print(f"kernels   {kernels_folder()}\nnotebooks {notebooks_folder()}")
