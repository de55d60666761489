"""The pictures in README and index.ipynb: the top of merge's report and its panel, from the demo model, in JupyterLab.

python tests/pictures.py    writes docs/images again (trains the demo model if it is not there)
"""

import io
import os
import sys
import tempfile
from pathlib import Path

from browser.lab import CHROMIUM, MISSING, Lab, copy_project, jupyter_lab, open_notebook, panel_of, run_all
from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 1100


def save(png: bytes, name: str) -> None:
    """With a palette of 128 colours: text and flat areas need no more, and the file is a third of the size."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    IMAGES.mkdir(exist_ok=True)
    image.save(IMAGES / name, optimize=True)
    print(f"{name}: {(IMAGES / name).stat().st_size // 1000} kB")


def photograph(page: Page, lab: Lab) -> None:
    """Run all of merge.ipynb, then its plan from the panel."""
    open_notebook(page, lab, "merge")
    run_all(page, 900)
    panel = panel_of(page)
    panel.get_by_role("button", name="Plan", exact=True).click()
    panel.get_by_role("region", name="The plan").wait_for()
    panel.get_by_text("done after").wait_for()
    page.wait_for_timeout(1000)
    box = panel.locator(".jp-Cell-outputWrapper").bounding_box()
    margin = 70  # left of the panel: the prompt
    clip = {"x": box["x"] + margin, "y": box["y"], "width": min(box["width"], WIDTH) - margin, "height": 640}
    save(page.screenshot(clip=clip), "panel.png")
    page.set_viewport_size({"width": WIDTH, "height": 1000})
    page.goto((lab.folder / "reports" / "merge" / "report.html").as_uri())
    page.wait_for_timeout(1000)
    save(page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": 1000}), "report.png")


def main() -> None:
    if MISSING:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project, {})
        demo = os.environ.get("RWKV_LAB_DEMO", str(ROOT / "demo"))
        environment = os.environ | {"PYTHONPATH": str(project), "RWKV_LAB_DEMO": demo}
        with jupyter_lab(project, environment) as lab, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH + 350, "height": 2600})  # beside Lab's file list
            page.set_default_timeout(300_000)
            photograph(page, lab)
            browser.close()


if __name__ == "__main__":
    main()
