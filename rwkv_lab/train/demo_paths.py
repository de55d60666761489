"""Where the demo files are kept; nothing here trains them, or needs torch."""

from pathlib import Path

from rwkv_lab.resources import checkout_folder, folder_of_variable, user_cache_folder


def demo_folder() -> Path:
    """Where the demo files are kept: `$RWKV_LAB_DEMO`, else `demo/` of the checkout, else the user's cache folder."""
    if chosen := folder_of_variable("RWKV_LAB_DEMO"):
        return chosen
    if checkout := checkout_folder():
        return checkout / "demo"
    return user_cache_folder() / "demo"


def demo_file(what: str) -> Path:
    """Where the demo's `base` or `state` is kept, whether it is there yet or not."""
    return demo_folder() / f"demo-{what}.pth"
