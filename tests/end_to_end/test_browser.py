"""What a user sees in a browser on MLflow's pages, from the link that `run` printed to the report. Needs Chromium."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.commands import REDUCED, Run, command, environment

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
BEST = "p=1 r0=0.1 #02"
"""A trial of the reduced digits sweep as the table names it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def server(soflowctl: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of `soflowctl ui` on a finished and promoted sweep with its report, and the page that it printed."""
    root = str(tmp_path_factory.mktemp("browser") / "runs")
    for arguments in (
        ["run", "digits", *REDUCED],
        ["promote", "models:/digits@candidate"],
        ["report", "digits"],
    ):
        done = soflowctl(*arguments, "--storage", root)
        assert done.returncode == 0, done.stderr
    arguments = command("ui", "--storage", root, "--port", "0", "--no-open")
    with subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[2]
            yield address, process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.fixture
def page(server: tuple[str, str]) -> Iterator[Any]:
    """A browser's page that shows the sweep."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright, of the extra `dev`, is not installed"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(60_000)
        opened.goto(server[1])
        opened.get_by_text(BEST).wait_for()
        yield opened
        browser.close()


def pixels(image: Any) -> int:
    """Width of a picture that the browser has loaded and drawn; 0 where it could not."""
    image.evaluate("image => image.decode().catch(() => null)")
    return int(image.evaluate("image => image.naturalWidth"))


def grid(page: Any, step: int) -> Any:
    """The picture of one evaluation's samples at this step, once it is on the page."""
    found = page.locator(f"img[src*='samples~nfe1%2Bstep%2B{step}%2B']").first
    found.wait_for(state="attached")
    return found


def test_the_printed_link_lists_the_trials_the_best_first_with_what_varies(page: Any) -> None:
    text = page.inner_text("body")
    names = re.findall(r"p=\S+ r0=\S+ #0\d", text)
    assert sorted(names) == ["p=0.5 r0=0.1 #00", "p=0.5 r0=0.5 #01", BEST, "p=1 r0=0.5 #03"]
    page.get_by_text("objective.schedule.initial").first.wait_for()
    page.get_by_text("eval/fd_nfe1").first.wait_for()


def test_a_trials_page_shows_its_grids_and_curves_and_the_slider_changes_the_picture(page: Any) -> None:
    page.get_by_text(BEST).click()
    assert pixels(grid(page, step=40)) > 16
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_text("fd_nfe1", exact=True).first.wait_for()
    section = page.get_by_text("samples", exact=True).first
    section.wait_for()
    section.scroll_into_view_if_needed()
    slider = page.get_by_role("slider").first
    slider.wait_for()
    assert "step%2B0%2B" in page.locator("img[src*='samples~nfe1']").last.get_attribute("src")
    slider.focus()
    slider.press("ArrowRight")
    assert pixels(grid(page, step=10)) > 16


def test_the_registered_model_shows_its_card_its_grid_and_both_aliases(
    page: Any, server: tuple[str, str]
) -> None:
    page.goto(f"{server[0]}/#/models/digits/versions/1")
    page.get_by_text("Decisions", exact=True).wait_for()
    text = page.inner_text("body")
    for word in (
        "candidate",
        "champion",
        "first champion",
        "soflowctl generate --model models:/digits/1",
        "DiT, width 32",
    ):
        assert word in text
    assert pixels(grid(page, step=40)) > 16
    page.get_by_role("link", name=re.compile("#0")).first.click()
    page.get_by_text("Parent run", exact=True).wait_for()


def test_the_sweeps_run_leads_to_its_report(page: Any) -> None:
    page.get_by_text(BEST).click()
    page.get_by_role("link", name=re.compile("^digits-")).click()
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Report").click()
    report = opened.value.frame_locator("iframe").first
    report.get_by_text("trials finished").wait_for()
