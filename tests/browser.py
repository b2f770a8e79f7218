"""A real browser without a window, driven over a pipe by its own protocol (Chrome DevTools)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""Path of the browser; ``None`` if there is none."""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --disable-dev-shm-usage --remote-debugging-pipe"
)
PATIENCE = 60.0  # seconds


class Page:
    """One page of a running browser.

    Args:
        to: Descriptor that commands are written to.
        answers: Descriptor that answers and events are read from.
    """

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._answers, self._number, self._unread = to, answers, 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result; events meanwhile are kept."""
        number = self._write(method, parameters)
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])
            self.events.append(message)

    def _write(self, method: str, parameters: dict[str, Any]) -> int:
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        command |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to, json.dumps(command).encode() + b"\0")
        return self._number

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._answers], [], [], PATIENCE)[0], "the browser says nothing"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser is gone"
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        message = dict(json.loads(text))
        if message.get("method") == "Page.javascriptDialogOpening":  # such as "leave the page?"
            self._write("Page.handleJavaScriptDialog", {"accept": True})
        return message

    def open(self, file: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key: ``Tab``, or `` `` for the space bar."""
        code = {"Tab": 9, " ": 32}[key]
        down = {"key": key, "windowsVirtualKeyCode": code, **({"text": " "} if key == " " else {})}
        self.send("Input.dispatchKeyEvent", type="keyDown", **down)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window, in pixels, and the color scheme that the user prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def download(self, folder: Path, name: str, expression: str) -> Path:
        """Run what starts a download, and return the file when it is complete."""
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.run(expression)
        end = time.monotonic() + PATIENCE
        while not (folder / name).exists():
            assert time.monotonic() < end, f"{name} was not downloaded"
            time.sleep(0.02)
        return folder / name

    def complaints(self) -> list[str]:
        """Errors of scripts and of the browser on the page so far."""
        self.run("0")
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start the browser with a new profile in an empty folder, and end it."""
    assert BROWSER is not None
    theirs_in, to = os.pipe()
    answers, theirs_out = os.pipe()

    def inherit() -> None:  # the browser reads from descriptor 3 and writes to 4
        ends = [os.dup(theirs_in), os.dup(theirs_out)]
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command,
        preexec_fn=inherit,  # noqa: PLW1509  (no thread of ours starts processes meanwhile)
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(to, answers)
    finally:
        process.kill()
        process.wait()
        for end in (to, answers):
            with suppress(OSError):
                os.close(end)
