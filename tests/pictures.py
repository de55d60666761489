"""The pictures in README: the top of merge's report and its panel, from the demo model, by JupyterLab in chromium.

python tests/pictures.py    writes docs/images again (trains the demo model if it is not there)
"""

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from notebooks.test_lab import CHROMIUM, jupyter_lab
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


def run_notebook(page: Page, address: str, report: Path) -> None:
    """Run all cells of merge.ipynb, and wait for its report."""
    page.goto(f"{address}/lab/tree/merge.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.get_by_text("Python 3 (ipykernel)", exact=False).first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    while not (report / "report.html").exists():
        page.wait_for_timeout(500)


def photograph(page: Page, address: str, report: Path) -> None:
    run_notebook(page, address, report)
    panel = page.locator(".jp-CodeCell").nth(2)
    panel.scroll_into_view_if_needed()
    panel.get_by_role("button", name="Plan").click()
    panel.get_by_text("The plan", exact=True).wait_for()
    page.wait_for_timeout(1000)
    box = panel.locator(".jp-Cell-outputWrapper").bounding_box()
    clip = {"x": box["x"], "y": box["y"], "width": min(box["width"], WIDTH), "height": min(box["height"], 760)}
    save(page.screenshot(clip=clip), "panel.png")
    page.set_viewport_size({"width": WIDTH, "height": 1000})
    page.goto((report / "report.html").as_uri())
    page.wait_for_timeout(1000)
    save(page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": 1000}), "report.png")


def main() -> None:
    if CHROMIUM is None:
        sys.exit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        root, report = Path(folder), Path(folder) / "report"
        (root / "notebooks").mkdir()
        text = (ROOT / "notebooks" / "merge.ipynb").read_text()
        assert text.count('report: str = \\"\\"') == 1
        text = text.replace('report: str = \\"\\"', f'report: str = \\"{report}\\"')
        (root / "notebooks" / "merge.ipynb").write_text(text)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with jupyter_lab(root, environment) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH + 350, "height": 2600})  # beside Lab's file list
            page.set_default_timeout(300_000)
            photograph(page, address, report)
            browser.close()
        shutil.rmtree(report, ignore_errors=True)


if __name__ == "__main__":
    main()
