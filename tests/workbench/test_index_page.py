"""The list of runs in a browser, from the disk: sorted, filtered, and runs beside each other."""

import json

import pytest

from rwkv_lab.workbench.runs import write_index

EVIL = "</script><img src=x onerror=alert(1)>"


def finished(folder, name: str, notebook: str, **parameters) -> None:
    (folder / name).mkdir()
    (folder / name / "map.png").write_bytes(b"\x89PNG")
    result = {
        "notebook": notebook,
        "status": "ok",
        "parameters": parameters,
        "metrics": {"bits": {"python": float(parameters["alpha"])}, "summary": EVIL},
        "checks": [{"name": "size", "value": 3, "limit": 3, "passed": True}],
        "figures": [str(folder / name / "map.png")],
        "inputs": [{"path": f"/home/ada/{name}.pth"}],
        "started": f"2026-01-0{parameters['alpha']}T00:00:00+00:00",
    }
    (folder / name / "result.json").write_text(json.dumps(result))


@pytest.fixture
def index(tmp_path):
    finished(tmp_path, "a", "merge", alpha=1, out="/home/ada/x.pth")
    finished(tmp_path, "b", "merge", alpha=2, out="/home/ada/x.pth", note=EVIL)
    finished(tmp_path, "c", "inspect", alpha=3)
    return write_index(tmp_path)


def test_it_names_no_folder_of_the_disk_and_ends_no_element(index):
    text = index.read_text()
    assert "/home" not in text and "ada" not in text and "a.pth" in text
    assert text.count("</script>") == 2 and "<img" not in text


def test_by_hand(index, chromium):
    page, said = chromium.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(index.as_uri())
    folders = lambda: [row.inner_text() for row in page.locator("#runs tbody tr:visible td:nth-child(5)").all()]  # noqa: E731
    assert folders() == ["c", "b", "a"]  # the last one first
    page.get_by_role("button", name="folder").click()
    assert folders() == ["a", "b", "c"]
    page.get_by_role("searchbox").fill("merge")
    assert folders() == ["a", "b"] and page.locator("#count").inner_text() == "2 of 3"
    page.get_by_label("compare a").check()
    assert page.locator("#compare").inner_text() == ""
    page.get_by_label("compare b").check()
    tables = page.locator("#compare table")
    assert tables.nth(0).inner_text().split() == ["a", "b", "alpha", "1", "2", "note", "–", *EVIL.split()]
    assert "bits.python\t1\t2" in tables.nth(1).inner_text() and "PASS: 3" in tables.nth(2).inner_text()
    assert page.locator("#compare img").count() == 2
    page.goto(f"{index.as_uri()}#run=a&run=c")
    page.reload()
    assert page.locator("#compare table").nth(0).inner_text().split()[:2] == ["c", "a"]
    assert not [text for text in said if "map.png" not in text]  # the pictures here are none
