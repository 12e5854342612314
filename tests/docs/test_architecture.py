"""The picture of the packages is that of the code, and every file that a page names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import PAGES, ROOT

FOLDERS = "soflow_core|pipelines|platform|tests|sweeps|benchmarks|docs|infra"
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+\.\w+)`")
LINK = re.compile(r"\]\(([^)#:]+?)(?:#([\w-]+))?\)")
CREATED = {"docs/new-method.md"}
"""Pages that name files which the reader makes."""


def test_the_picture_of_the_packages_is_current() -> None:
    script = ROOT / "docs" / "pictures" / "packages.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if str(page.relative_to(ROOT)) not in CREATED],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert [
        name for name in FILE.findall(page.read_text(encoding="utf-8")) if not (ROOT / name).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link, anchor in LINK.findall(prose):
        target = page.parent / link
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_every_path_of_a_step_in_the_architecture_is_a_file_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for title in ("The path of a batch", "soflowctl run", "soflowctl generate", "Processes of a sweep"):
        section = re.split(r"\n#+ ", text.split(f"# {title}\n")[1])[0]
        rows = [row for row in section.splitlines() if row.startswith("| ") and not row.startswith("|---")][
            1:
        ]
        assert rows, title
        assert [row for row in rows if not FILE.search(row)] == [], title


def test_every_module_that_the_changelog_names_as_the_present_one_exists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `soflow_[\w.]+` \| (.+) \|$", text, re.MULTILINE)
    modules = {module for row in rows for module in re.findall(r"`([\w.]+)`", row)}
    assert len(modules) > 50
    folders = {"soflow_core": "", "soflow_pipelines": "pipelines/", "soflow_platform": "platform/"}
    missing = [
        m for m in modules if not (ROOT / f"{folders[m.split('.')[0]]}{m.replace('.', '/')}.py").exists()
    ]
    assert missing == []
