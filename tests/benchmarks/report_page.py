"""How large a report of a large run is, and how soon it is there in headless Chromium.

    python tests/benchmarks/report_page.py [--layers 300] [--steps 100] [--opened 5]

It needs delve_ray[test], chromium and chromedriver. Times are medians on an idle machine; `usable` is when findings,
table and controls are there, `charts` when all charts are drawn in a window that is high enough for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from delve_ray.analysis.report import write_report
from tests.analysis.report.browser import Page, open_browser
from tests.analysis.report.pages import write_large_run

HIGH = {"width": 1280, "height": 4000, "deviceScaleFactor": 1, "mobile": False}


def main() -> None:
    """Write a run and its page, open it a few times, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--opened", type=int, default=5, help="how often the page is opened")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_large_run(Path(folder, "run"), options.layers, options.steps)
        began = time.perf_counter()
        write_report(Path(folder, "run"), Path(folder, "page.html"))
        written = time.perf_counter() - began
        size = Path(folder, "page.html").stat().st_size
        usable, charts = zip(*open_often(Path(folder, "page.html"), options.opened), strict=True)
    print(f"{options.layers} layers × {options.steps} steps × 2 phases")
    print(f"written in {written:.1f} s; {size / 1e6:.2f} MB")
    for name, times in (("usable", usable), ("charts", charts)):
        print(f"{name:<7} median {statistics.median(times):.2f} s, worst {max(times):.2f} s of {len(times)}")


def open_often(page: Path, count: int) -> list[tuple[float, float]]:
    """For each opening, the seconds from the navigation's start until the page is usable, and all charts are drawn."""
    times = []
    with open_browser() as browser:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", HIGH)
        for _ in range(count):
            browser.get("about:blank")
            opened = Page(browser, page)
            usable = opened.run("performance.getEntriesByName('ready')[0].startTime")
            opened.until("document.querySelectorAll('.plot[aria-busy=true]').length === 0")
            times.append((usable / 1000, opened.run("performance.now()") / 1000))
    return times


if __name__ == "__main__":
    main()
