"""A headless Chromium, told what to do over a pipe by the DevTools protocol."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Chromium:
    """One browser with one page; `said` are the errors, warnings and dialogs of the page that is open."""

    def __init__(self, program: str, profile: Path) -> None:
        (theirs, self.out), (self.back, ours) = os.pipe(), os.pipe()
        flags = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" {flags} about:blank 3<&{theirs} 4>&{ours} 2>/dev/null', program],
            pass_fds=(theirs, ours),
        )
        os.close(theirs)
        os.close(ours)
        self.number, self.session, self.rest, self.said = 0, None, b"", []
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command; what else comes meanwhile is heard."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params, **session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (heard := self._hear()).get("id") != self.number:
            pass
        assert "error" not in heard, heard
        return heard["result"]

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.back, 1 << 20)
            assert part, "Chromium has ended"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        heard = json.loads(line)
        if heard.get("method") == "Page.javascriptDialogOpening":
            self.said.append(heard["params"]["message"])
        elif heard.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.said.append(json.dumps(heard["params"]))
        return heard

    def look(self, address: str, width: int, height: int = 800, dark: bool = False) -> None:
        """Open a page, and wait until it is there."""
        self.said.clear()
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.tell("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script: str) -> Any:
        """Of a JavaScript expression."""
        return self.tell("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def close(self) -> None:
        self.tell("Browser.close") if self.process.poll() is None else None
        self.process.wait(timeout=30)
        os.close(self.out)
        os.close(self.back)
