"""A headless Chromium, driven over a pipe with the DevTools protocol: no driver and no websocket needed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars",
)  # fmt: skip

LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser listens at file descriptor 3 and answers at 4, wherever they were opened."""


class Browser:
    """One page in a browser of its own, with an empty profile. ``requests``: every address that the page asked for;
    ``complaints``: errors on its console."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable, "-ISc", LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS,
                f"--user-data-dir={self._profile.name}", "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._ids, self._buffer, self._session = itertools.count(1), b"", ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        pages = (t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        target = next(pages)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    # --- the protocol ---------------------------------------------------------------------------------------------
    def send(self, method: str, timeout: float = 60.0, **parameters: Any) -> Any:
        """One command and its answer; what happens meanwhile is noted."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._to, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._read(end, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _read(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer: {what}")
            part = os.read(self._from, 1 << 20)
            if not part:
                raise RuntimeError("the browser has gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif event.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"].get("exception", {}).get("description", told)))

    # --- what a visitor does --------------------------------------------------------------------------------------
    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> Any:
        """Until a JavaScript expression holds; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.run(condition):
                return found
            time.sleep(0.05)
        raise TimeoutError(f"never came true: {condition}; the page shows: {self.run('document.body.innerText')[:800]}")

    def click(self, selector: str, words: str = "") -> None:
        """The first visible element of a CSS selector whose text starts with ``words``, by a press of the mouse."""
        x, y = self.middle(selector, words)
        self.drag([(x, y)])

    def middle(self, selector: str, words: str = "") -> tuple[float, float]:
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})].find(e => e.offsetParent !== null && "
            f"e.innerText.trim().startsWith({json.dumps(words)}))"
        )
        self.wait(f"Boolean({found})")
        box = self.run(
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return box[0], box[1]

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press at the first point, move through the others, let go at the last."""
        kinds = ["mouseMoved", "mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [points[0], *points, points[-1]], strict=True):
            held = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {"buttons": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def type(self, selector: str, text: str) -> None:
        """Into an input, in place of what it held."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """The whole page, from top to bottom."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def outside(self) -> list[str]:
        """Addresses asked for that are not on this machine."""
        parts = ((url, urlsplit(url)) for url in self.requests)
        return [url for url, part in parts if part.hostname not in (None, "127.0.0.1")]
