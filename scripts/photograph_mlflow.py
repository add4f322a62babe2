"""Photograph what MLflow's interface shows of a registered version and of the run that made it.

Four PNGs: the runs as a tree, the curves of the training step, the load of the machine, and the version. The pictures
of docs/ are made by it from a run of `nvila run fast` with a server of MLflow's and SeaweedFS.

Usage:
    python scripts/photograph_mlflow.py --mlflow http://127.0.0.1:5000 --model nvila

Needs Chromium (apt install chromium) and the development packages.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1440, 900
# Charts are drawn after their data have come, one after the other.
_SETTLE_MS = 12_000
# The panel of the assistant would take a quarter of every picture.
_NO_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
# What shows the steps below a run.
_UNFOLD = "button[data-component-id*=runnamecellrenderer]"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Photograph what MLflow shows of a version and its run.")
    parser.add_argument("--mlflow", required=True, metavar="URL", help="address of the server")
    parser.add_argument("--model", default="nvila", help="registered model (default: nvila)")
    parser.add_argument("--alias", default="candidate", help="alias of the version (default: candidate)")
    parser.add_argument("--dest", type=Path, default=ROOT / "docs" / "images", help="folder (default: docs/images)")
    args = parser.parse_args(argv)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        print("error: Chromium is missing\nhint: apt install chromium", file=sys.stderr)
        return 1
    pages = addresses(args.mlflow.rstrip("/"), args.model, args.alias)
    args.dest.mkdir(parents=True, exist_ok=True)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.add_init_script(_NO_ASSISTANT)
        for name, address in pages.items():
            photograph(page, address, args.dest / f"{name}.png")
            print(args.dest / f"{name}.png")
        browser.close()
    return 0


def addresses(server: str, model: str, alias: str) -> dict[str, str]:
    """Return the pages of a version, by the names of their pictures."""
    from mlflow import MlflowClient

    client = MlflowClient(server)
    version = client.get_model_version_by_alias(model, alias)
    parent = client.get_run(str(version.run_id))
    experiment = parent.info.experiment_id
    steps = client.search_runs([experiment], filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    train = next(run.info.run_id for run in steps if run.info.run_name == "train")
    runs = f"{server}/#/experiments/{experiment}/runs"
    return {
        "mlflow": runs,
        "mlflow-training": f"{runs}/{train}/model-metrics",
        "mlflow-load": f"{runs}/{train}/system-metrics",
        "mlflow-version": f"{server}/#/models/{model}/versions/{version.version}",
    }


def photograph(page: Page, address: str, path: Path) -> None:
    """Save what a page shows once it has settled; it never is quiet, because it asks for news."""
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_timeout(_SETTLE_MS)
    if page.locator(_UNFOLD).count():
        page.locator(_UNFOLD).first.click()
        page.wait_for_timeout(_SETTLE_MS / 4)
    page.screenshot(path=path)


if __name__ == "__main__":
    raise SystemExit(main())
