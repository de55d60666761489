"""What axe finds on a page."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

_GRAVE = ("serious", "critical")


def assert_accessible(page: "Page", part: str | None = None) -> None:
    """Nothing serious or critical on a page, or in the part that a CSS selector names; else rules and elements."""
    from axe_playwright_python.sync_playwright import Axe  # tests that skip without it must be collected

    found = Axe().run(page, part).response
    assert found["passes"]  # it looked at something
    grave = [
        f"{rule['id']}: {node['html'][:200]}\n  {node['failureSummary']}"
        for rule in found["violations"]
        if rule["impact"] in _GRAVE
        for node in rule["nodes"]
    ]
    assert not grave, "\n".join(grave)
