"""Chromium without a head and without a network, for tests of pages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHARTS = ("per-layer", "over-steps", "spectrum", "heatmap")
"""Those that every page has."""
DEADLINE = 60
"""Seconds that a condition may take."""


@contextmanager
def open_browser() -> Iterator[Any]:
    """A `selenium` driver at 1280×900; the test is skipped without Chromium, but not where CI is set."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        assert not os.environ.get("CI"), "CI needs chromium and chromedriver (Debian: chromium chromium-driver)"
        pytest.skip("needs chromium and chromedriver")
    if not os.environ.get("CI"):
        pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield browser
    finally:
        browser.quit()


class Page:
    """A report that is open in a browser."""

    def __init__(self, browser: Any, path: Path) -> None:
        self._browser = browser
        for kind in ("browser", "performance"):
            browser.get_log(kind)  # what earlier pages have left
        browser.get(path.as_uri())
        self.until("document.documentElement.dataset.ready === 'true'")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression; `arguments` are its `arguments`."""
        return self._browser.execute_script(f"return {script}", *arguments)

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + DEADLINE
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition} is still false; {self._browser.get_log('browser')}"
            time.sleep(0.02)

    def choose(self, control: str, value: str) -> None:
        """Set a control as its user does: by an option's text, or a slider's position, or what is typed."""
        script = """((id, value) => {
            const control = document.getElementById(id);
            const option = [...(control.options || [])].find((option) => option.text === value);
            if (control.options && !option) throw new Error(`no option ${value} in ${id}`);
            control.value = option ? option.value : value;
            control.dispatchEvent(new Event(control.options ? "change" : "input", { bubbles: true }));
        })(arguments[0], arguments[1])"""
        self.run(script, control, value)

    def chart(self, name: str) -> Any:
        """What a chart holds once it is drawn and up to date: {data, layout}, as Plotly has it."""
        self.run("document.getElementById(arguments[0]).scrollIntoView()", name)
        self.until(f"document.getElementById({name!r}).ariaBusy === 'false'")
        script = """(() => {
            const plot = document.getElementById(arguments[0]);
            return JSON.stringify({ data: plot.data, layout: plot.layout });
        })()"""
        return json.loads(self.run(script.replace("arguments[0]", json.dumps(name))))

    def table(self) -> list[list[str]]:
        """The rows of the table of layers, as texts."""
        rows: list[list[str]] = self.run(
            "[...document.querySelector('table#layers').tBodies[0].rows]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        return rows

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that a selector finds."""
        script = "[...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        found: list[str] = self.run(script, selector)
        return found

    def complaints(self) -> list[str]:
        """What the page wrote to the console, and each request that was not for the page itself, or failed."""
        said = [entry["message"] for entry in self._browser.get_log("browser")]
        for entry in self._browser.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                url = event["params"]["request"]["url"]
                if not url.startswith(("file://", "data:", "blob:")):
                    said.append(f"request for {url}")
            elif event["method"] == "Network.loadingFailed":
                said.append(f"failed: {event['params']}")
        return said

    def press(self, script: str) -> None:
        """Click the element that a JavaScript expression gives."""
        self.run(f"{script}.click()")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        self._browser.execute_cdp_cmd("Page.enable", {})
        shot = self._browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def emulate(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme="dark"."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def printed(self) -> bytes:
        """The page as the browser prints it, as PDF."""
        pdf = self._browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": False})
        return base64.b64decode(pdf["data"])
