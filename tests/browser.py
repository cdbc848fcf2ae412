"""A headless Chromium for the tests: a small W3C WebDriver client over plain HTTP.

The commands are those of https://www.w3.org/TR/webdriver2/. One Browser is one chromedriver on a
free port with one session; close() ends both. An error of the driver raises WebDriverError."""

import base64
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import requests

from native.processes import free_port
from tests.stack import until

WAIT_SECONDS = 10.0
START_SECONDS = 30.0
CALL_SECONDS = 60.0
STOP_SECONDS = 5.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element, from the standard
SWITCHES = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
KEYS = {"Backspace": "\ue003", "Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c"}
HAS_BROWSER = all(shutil.which(name) for name in ("chromium", "chromedriver"))


class WebDriverError(Exception):
    """The driver answered a command with an error."""


class Element:
    """An element of the page; one that is gone raises WebDriverError."""

    def __init__(self, browser: "Browser", reference: str) -> None:
        self.browser = browser
        self.reference = reference

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Give the driver a command for this element."""
        return self.browser.call(method, f"/element/{self.reference}/{path}", body)

    @property
    def text(self) -> str:
        """Return the text as it is shown."""
        return self.call("GET", "text")

    def attribute(self, name: str) -> str | None:
        """Return an attribute's value, None without it."""
        return self.call("GET", f"attribute/{name}")

    def click(self) -> None:
        """Scroll to the element and click; a covered one raises WebDriverError."""
        self.call("POST", "click")

    def type(self, text: str) -> None:
        """Add text to a field."""
        self.call("POST", "value", {"text": text})

    def clear(self) -> None:
        """Empty a field."""
        self.call("POST", "clear")


class Browser:
    """One headless Chromium with a profile of its own."""

    def __init__(self, language: str = "en-US", width: int = 1280, height: int = 900) -> None:
        self.port = free_port()
        self.profile = tempfile.mkdtemp(prefix="tasks-browser-")
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Chromium is in its group, and ends with it
        )
        self.http = requests.Session()
        self.session = ""
        try:
            until(self.is_listening, START_SECONDS, "chromedriver listens")
            self.open_session(language)
            self.size(width, height)
        except BaseException:
            self.close()
            raise

    def is_listening(self) -> bool:
        """Tell whether the driver takes a session."""
        with contextlib.suppress(requests.ConnectionError):
            return self.call("GET", "/status")["ready"]
        return False

    def open_session(self, language: str) -> None:
        """Start Chromium in a language."""
        arguments = [*SWITCHES, f"--user-data-dir={self.profile}", f"--lang={language}"]
        options = {"args": arguments, "prefs": {"intl.accept_languages": language}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Give the driver a command and return the `value` of its answer."""
        url = f"http://127.0.0.1:{self.port}{self.session}{path}"
        body = body or {} if method == "POST" else None
        answer = self.http.request(method, url, json=body, timeout=CALL_SECONDS)
        value = answer.json()["value"]
        if answer.status_code >= 400:
            raise WebDriverError(f"{value['error']}: {value.get('message', '')}")
        return value

    def close(self) -> None:
        """End the session, Chromium, the driver and the profile."""
        if self.session:
            with contextlib.suppress(requests.RequestException, WebDriverError):
                self.call("DELETE", "")
        self.driver.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        self.http.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def go(self, url: str) -> None:
        """Open a page and wait until it is loaded; another #hash loads nothing anew."""
        self.call("POST", "/url", {"url": url})

    def back(self) -> None:
        """Press the browser's Back."""
        self.call("POST", "/back")

    def reload(self) -> None:
        """Load the page again."""
        self.call("POST", "/refresh")

    @property
    def url(self) -> str:
        """Return the address of the page."""
        return self.call("GET", "/url")

    def find_all(self, css: str) -> list[Element]:
        """Return the elements that a selector matches now."""
        found = self.call("POST", "/elements", {"using": "css selector", "value": css})
        return [Element(self, each[ELEMENT]) for each in found]

    def find(self, css: str) -> Element:
        """Return the first element that a selector matches; wait until there is one."""
        return self.wait(css)[0]

    def text(self, css: str) -> str:
        """Return the shown text of an element."""
        return self.find(css).text

    def click(self, css: str) -> None:
        """Click on an element."""
        self.find(css).click()

    def type(self, css: str, text: str) -> None:
        """Put a text into a field in place of what it holds."""
        field = self.find(css)
        field.clear()
        field.type(text)

    def keys(self, *keys: str) -> None:
        """Press keys one after another where the focus is: characters or names of KEYS."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": key} for key in codes for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", "/actions", {"actions": [keyboard]})

    def script(self, source: str, *arguments: Any) -> Any:
        """Run the body of a function in the page and return what it returns; awaits a promise."""
        return self.call("POST", "/execute/sync", {"script": source, "args": list(arguments)})

    def wait(self, condition: str | Callable[[], Any], timeout: float = WAIT_SECONDS) -> Any:
        """Wait for a selector to match, or for a function to return a true value; return that."""
        if isinstance(condition, str):
            return until(lambda: self.find_all(condition), timeout, condition)
        return until(condition, timeout)

    def size(self, width: int, height: int) -> None:
        """Give the page a size, which may be narrower than a window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def media(self, **features: str) -> None:
        """Emulate media features, such as prefers_color_scheme="dark"."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.devtools("Emulation.setEmulatedMedia", {"features": pairs})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """Give Chromium a command of the DevTools protocol."""
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: str | pathlib.Path) -> None:
        """Write what the window shows to a PNG file."""
        pathlib.Path(path).write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def console(self) -> list[dict[str, Any]]:
        """Return what the console logged since the last call: [{"level", "message", …}]."""
        return self.call("POST", "/se/log", {"type": "browser"})
