"""A headless Chromium for the tests, controlled by the Chrome DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60  # seconds that an answer may take
KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "Tab": 9,
    "Enter": 13,
    "Backspace": 8,
    " ": 32,
}
TYPED = {"Enter": "\r", " ": " "}  # without its character, a key presses no button


def find_chromium():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab that records its requests and errors from the start.

    Attributes:
        requests: the addresses that were requested.
        complaints: exceptions, and warnings and errors on the console.
    """

    def __init__(self, chromium):
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        # Chromium reads commands from its handle 3 and writes answers to its handle 4
        commands, self._commands = _high_pipe()
        self._answers, answers = _high_pipe()
        arguments = [
            chromium,
            "--headless",
            "--no-sandbox",  # it refuses to start as root otherwise; it only sees our own page
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            f"--user-data-dir={self._profile}",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        self._process = os.posix_spawn(
            chromium,
            arguments,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, commands, 3),
                (os.POSIX_SPAWN_DUP2, answers, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._last, self._session = b"", 0, None
        self.requests, self.complaints, self._loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Send a command and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, path, width=1280, height=900, scale=1, hash=""):
        """Load a file, with what follows # in its address, and wait until its scripts have run."""
        self.resize(width, height, scale)
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url="about:blank")  # another # alone would load nothing
        self._await_load()
        self.requests.clear()
        address = Path(path).absolute().as_uri()
        self.call("Page.navigate", url=f"{address}#{hash}" if hash else address)
        self._await_load()

    def _await_load(self):
        while not self._loaded:
            self._receive()
        self._loaded = False

    def resize(self, width, height, scale=1):
        """Set the size of the window in pixels; a narrow window emulates a phone."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def run(self, script):
        """Evaluate a JavaScript expression in the page, awaiting promises."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key, times=1):
        """Press a key, which goes to the focused element."""
        code = KEYS[key]
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=code,
                    **({"text": TYPED[key]} if key in TYPED and kind == "keyDown" else {}),
                )

    def drag(self, points):
        """Press the mouse button at the first point, and move along the others."""
        for kind, (x, y) in (
            ("mousePressed", points[0]),
            *(("mouseMoved", point) for point in points[1:]),
            ("mouseReleased", points[-1]),
        ):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="left",
                buttons=1,
                clickCount=1,
            )

    def prefer(self, **features):
        """Emulate media features, such as `color_scheme="dark"`."""
        named = [{"name": n.replace("_", "-"), "value": v} for n, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=named)

    def screenshot(self, whole=False):
        """Take a PNG screenshot of the window, or of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(picture["data"])

    def close(self):
        """End the browser and remove its profile."""
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._commands)
        os.close(self._answers)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _receive(self):
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
            assert ready, f"Chromium did not answer in {PATIENCE} s"
            content = os.read(self._answers, 1 << 20)
            assert content, "Chromium ended"
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(message)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event, details):
        match event:
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(details["exceptionDetails"])
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                self.complaints.append(details["args"])
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                self.complaints.append(details["entry"])


def _high_pipe():
    """A pipe whose handles are above those that the browser is given."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high
