"""The page in headless Chromium: it opens, sorts and filters, and fits a narrow screen."""

import json
import os
import shutil
import subprocess

import pytest
from report_material import replacement_row, report_of

from resae.report.page import write_report
from resae.storage import save_json

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium"
)


OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run")
OPTIONS += ("--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One page in headless Chromium, spoken to over pipes with the DevTools protocol."""

    def __init__(self, profile):
        # Chromium reads its commands from descriptor 3 and writes to 4.
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null', "sh", CHROMIUM, *OPTIONS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._buffer, self._calls = b"", 0
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session = None

    def call(self, method, **parameters):
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._buffer:
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            assert part, "chromium ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "id" not in message:
            self.events.append(message)
        return message

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def resize(self, width):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Emulation.setScrollbarsHidden", hidden=True)

    def run(self, script):
        """Value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key, text):
        code = {"Tab": 9, "Enter": 13}[key]
        event = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **event)

    def complaints(self):
        """Errors and warnings of the console, those of the content-security policy among them."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [event for event in self.events if event["method"] in kinds]

    def close(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    rows = [
        replacement_row(method, loop, mode, k, 1.0 / k if k else 0.5)
        for mode in ("online", "teacher_forced")
        for method, loop, ks in (("raw", None, (2, 4, 8, 16)), ("resae", "closed", (4, 8, 16, 32)),
                                 ("affine_only", None, (None,)))
        for k in ks
    ]  # fmt: skip
    save_json(folder / "report.json", report_of(replacement=rows))
    browser = Browser(folder / "profile")
    browser.resize(400)
    browser.open(write_report(folder))
    yield browser
    browser.close()


TABLE = "document.getElementById('replaced-online')"


def column(number):
    """JavaScript for the texts of one column, without rows that are filtered out."""
    rows = "[...document.querySelectorAll('#replaced-online tbody tr')]"
    return f"{rows}.filter(row => row.offsetParent).map(row => row.cells[{number}].textContent)"


def test_the_page_opens_without_a_complaint_and_fits_a_narrow_screen(browser):
    assert browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth") == 400
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert browser.run("document.documentElement.scrollWidth") == 400
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", features=[dark])
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"


def test_a_click_on_a_heading_sorts_and_says_so(browser):
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    before = browser.run(column(3))
    seen = []
    for _ in range(3):
        browser.run(f"{TABLE}.tHead.rows[0].cells[3].firstChild.click()")
        order = browser.run(f"{TABLE}.tHead.rows[0].cells[3].getAttribute('aria-sort')")
        seen.append((order, browser.run(column(3))))
    assert seen == [
        ("ascending", sorted(before, key=float)),
        ("descending", sorted(before, key=float, reverse=True)),
        (None, before),
    ]
    for least in ("2", "32"):  # the row without k stays last in both directions
        browser.run(f"{TABLE}.tHead.rows[0].cells[1].firstChild.click()")
        ks = browser.run(column(1))
        assert (ks[0], ks[-1]) == (least, "–")
    browser.run(f"{TABLE}.tHead.rows[0].cells[1].firstChild.click()")


def test_a_filter_keeps_the_rows_with_all_its_words_and_says_how_many(browser):
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    for words, kept in (
        ("RAW 16", ["raw SAEs"]),
        ("", None),
        ("resae", ["ReSAE, closed loop"] * 4),
    ):
        status = browser.run(
            f"(bar => {{ const input = bar.querySelector('input'); input.value = '{words}';"
            "input.dispatchEvent(new Event('input'));"
            "return bar.querySelector('[role=status]').textContent })"
            f"({TABLE}.closest('.wide').previousElementSibling)"
        )
        shown = browser.run(column(0))
        assert shown == kept or (kept is None and len(shown) == 9)
        assert status == (f"{len(shown)} of 9 rows" if words else "")


def test_everything_is_printed(browser):
    """Sections that are closed, too, and no table is wider than the paper."""
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = false })")
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.resize(700)  # A4 less its margins
    visible = "checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})"
    assert browser.run(f"document.getElementById('training-1-title').closest('svg').{visible}")
    assert browser.run("document.documentElement.scrollWidth") <= 700
    widths = "[...document.querySelectorAll('table')].map(table => table.scrollWidth)"
    assert max(browser.run(widths)) <= 700
    browser.call("Emulation.setEmulatedMedia", media="")


def test_the_keyboard_alone_sorts_and_shows_where_it_is(browser):
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    browser.run(f"{TABLE}.tHead.rows[0].cells[1].firstChild.focus()")
    browser.press("Tab", "\t")
    assert browser.run("document.activeElement.closest('th').cellIndex") == 2
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", "\r")
    assert browser.run(f"{TABLE}.tHead.rows[0].cells[2].getAttribute('aria-sort')") == "ascending"
    for _ in range(2):
        browser.press("Enter", "\r")
    assert browser.run(f"{TABLE}.tHead.rows[0].cells[2].getAttribute('aria-sort')") is None


def test_everything_has_a_name_for_a_screen_reader(browser):
    browser.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {"image", "button", "table", "searchbox", "region", "navigation", "link"}
    found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes
             if not node["ignored"] and node["role"]["value"] in named]  # fmt: skip
    assert all(name for _, name in found), [role for role, name in found if not name]
    roles = [role for role, _ in found]
    assert roles.count("table") == browser.run("document.querySelectorAll('table').length")
    assert roles.count("image") == browser.run("document.querySelectorAll('svg[role=img]').length")
    assert ("searchbox", "Filter rows: online: nats per token") in found
    described = [node.get("description", {}).get("value", "") for node in nodes]
    told = [name for role, name in found if role == "image"] + described
    assert any("ReSAE, closed loop: 0.250 at 4, 0.125 at 8" in text for text in told)
