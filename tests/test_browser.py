"""The UI, clicked by a browser: one partition of `queries` is materialised and shown as done (40 s).

Needs chromium (CHROMIUM, else /usr/bin/chromium); without it the test is skipped, unless CI is set. With
NBG_SCREENSHOT=docs/asset-graph.png the asset graph is saved there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from live import dagster_dev

pytestmark = pytest.mark.slow

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip


@pytest.fixture
def live(tmp_path, tiny_models):
    (tmp_path / "queries").mkdir()
    for name in ("addition", "reversal", "sorting"):
        rows = [{"prompt": f"{name} of {7919 * i} and {i * i}", "answer": str(i)} for i in range(12)]
        (tmp_path / "queries" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    profile = tmp_path / "browser.yaml"
    models = {"student": str(tiny_models.student), "teacher": str(tiny_models.teacher)}
    profile.write_text(yaml.safe_dump({"root": str(tmp_path), "models": models, "paths": {"queries": "queries"}}))
    with dagster_dev(profile, tmp_path) as live:
        yield live


@pytest.mark.skipif(not CHROMIUM.exists() and "CI" not in os.environ, reason=f"no chromium at {CHROMIUM}")
def test_a_partition_is_materialised_by_clicking(live):
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        expect.set_options(timeout=60_000)
        page.goto(f"{live.url}/assets/queries")
        expect(page.get_by_text("hash of the roles and texts of the messages")).to_be_visible()  # column schema
        page.get_by_role("button", name="Materialize…").click()
        page.get_by_text("Select a partition or create one").click()
        page.get_by_text("addition", exact=True).filter(visible=True).first.click()
        page.get_by_text("Launch runs to materialize queries").click()  # closes the list
        page.get_by_role("button", name="Launch 1 run").click()

        live.until("end of the run", lambda: [r["status"] for r in live.runs()] in (["SUCCESS"], ["FAILURE"]), 90)
        page.goto(f"{live.url}/assets/queries?view=partitions&partition=addition")
        expect(page.get_by_text("Materialized", exact=True).filter(visible=True).first).to_be_visible()
        expect(page.get_by_text("dagster/partition_row_count").first).to_be_visible()
        page.goto(f"{live.url}/assets/queries?view=checks")
        expect(page.get_by_text("no_train_eval_overlap").first).to_be_visible()
        assert live.runs()[0]["tags"]["dagster/partition"] == "addition"
        if target := os.environ.get("NBG_SCREENSHOT"):
            screenshot_graph(browser, live.url, Path(target))
        browser.close()


def screenshot_graph(browser, url: str, target: Path) -> None:
    """The asset graph, all groups open, cut to the nodes."""
    page = browser.new_page(viewport={"width": 2500, "height": 950})
    page.goto(f"{url}/asset-groups/")
    page.get_by_text("preferences", exact=True).filter(visible=True).last.wait_for()
    page.keyboard.press("Alt+e")
    page.get_by_text("student_checkpoint", exact=True).filter(visible=True).last.wait_for()
    page.wait_for_timeout(2000)  # the nodes move to their places
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target, clip={"x": 600, "y": 270, "width": 1840, "height": 640})
