"""The live view serves a run's page, with the contents of report.html, to browsers of this machine.

It reads nothing but the run's folder, so the run may be in progress, have ended, or be a copy from another machine. It
does not import torch, so that it starts fast. A request must carry a secret token. The browser runs no script but the
one below, even if a prompt or a plan contains one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import METRICS, RUN, SUMMARY
from .report import STYLE, document, parts_of, saved_samples
from .samples import load_samples

if TYPE_CHECKING:
    from werkzeug import Response

_NAMES = ("127.0.0.1", "localhost")
_NOW = (METRICS, RUN, SUMMARY)  # files that change during a run
_SCRIPT = """
const main = document.querySelector("main"), note = document.querySelector("#note")
let seen = null
function tell() {
  for (const time of document.querySelectorAll("time")) {
    const seconds = Math.max(0, Math.round((Date.now() - Date.parse(time.dateTime)) / 1000))
    time.title = time.dateTime
    time.textContent = seconds < 120 ? `${seconds} s ago` : seconds < 7200 ? `${Math.round(seconds / 60)} min ago`
      : time.dateTime.replace("T", " ").slice(0, 16)
  }
}
async function refresh() {
  try {
    const answer = await fetch(location.href, {cache: "no-cache"})
    if (!answer.ok) throw answer.status
    note.textContent = ""
    if (answer.headers.get("etag") === seen) return
    seen = answer.headers.get("etag")
    const page = new DOMParser().parseFromString(await answer.text(), "text/html")
    const parts = [...page.querySelector("main").children]
    while (main.children.length > parts.length) main.lastElementChild.remove()
    parts.forEach((part, i) => {
      const old = main.children[i]
      if (old && old.open) part.open = true
      if (!old) main.append(part)
      else if (!old.isEqualNode(part)) old.replaceWith(part)
    })
  } catch {
    note.textContent = "The view no longer answers: this is what it last showed."
  }
}
tell()
setInterval(tell, 1000)
setInterval(() => document.hidden || refresh(), 3000)
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(_SCRIPT)}",
            f"style-src {_hash(STYLE)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Cache-Control": "private, no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


class Run:
    """Renders the page of the run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stamp(self) -> str:
        """A hash that changes whenever the page changes."""
        found = [os.stat(path) for name in _NOW if (path := self.folder / name).exists()]
        state = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]
        return hashlib.sha256(repr((state, self._alive())).encode()).hexdigest()[:16]

    def page(self, token: str, step: str | None = None) -> str:
        """The page with the samples of `step`, or else the latest samples."""
        return document(self.folder.resolve().name, *self._parts(token, step))

    def _rows(self) -> list[dict[str, Any]]:
        """The metrics of each step."""
        try:
            lines = (self.folder / METRICS).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        rows = [_object(line) for line in lines if line.endswith(b"\n")]  # the run may be writing the last one
        return [row for row in rows if isinstance(row.get("step"), int)]

    def _parts(self, token: str, step: str | None) -> tuple[str, str, str]:
        """The content, the additional head and the script of the page."""
        about, summary, rows = _object(self.folder / RUN), _object(self.folder / SUMMARY), self._rows()
        settings, last = about.get("settings", {}), rows[-1]["step"] if rows else 0
        ended = self._ended(summary, last)
        saved = saved_samples(self.folder, last)
        shown = [path for path in saved if path.stem == step] or saved[-1:]
        tags = ("before", "after") if ended else ("before",)
        kept = {tag: load_samples(self.folder / "samples" / f"heldout-{tag}") for tag in tags}
        heldout = {tag: samples for tag, samples in kept.items() if samples}
        parts = parts_of(
            rows,
            settings,
            summary if ended else {},
            heldout,
            shown,
            about.get("alarms", []),
            about.get("heldout", []),
            _links(saved, shown, token),
        )
        content = "\n".join([self._state(ended, last, settings.get("max_steps")), *parts])
        return content, "<link rel='icon' href='data:,'>", f"<p id='note' role='status'></p><script>{_SCRIPT}</script>"

    def _state(self, ended: bool, last: int, total: int | None) -> str:
        steps = f"step {last}" if total is None else f"step {last} of {total}"
        if ended:
            said = f"{'Finished' if last == total else 'Stopped'} after {steps}"
        elif self._alive():
            said = f"Running, {steps} done"
        else:
            said = f"At {steps}; the run was killed, or is on another machine"
        path = self.folder / METRICS
        if not last or not path.exists():
            return f"<p>{said}.</p>"
        written = datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
        return f"<p>{said}. Last written: <time datetime='{written}'>{written}</time></p>"

    def _ended(self, summary: dict[str, Any], last: int) -> bool:
        """Whether the run has ended. A resumed run begins with the summary of the run before, which does not count."""
        if not last or summary.get("steps") != last:
            return False
        written = [os.stat(self.folder / name).st_mtime_ns for name in (METRICS, SUMMARY)]
        return not self._alive() or written[0] <= written[1]

    def _alive(self) -> bool:
        """Whether the process that locked the folder is running on this machine."""
        try:
            found = re.match(r"process (\d+) on (.*)", (self.folder / ".lock").read_text())
            if not found or found[2] != socket.gethostname():
                return False
            os.kill(int(found[1]), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:  # it is another user's process
            return True
        return True


def _object(source: Path | bytes) -> dict[str, Any]:
    """The JSON object in a file or a line; an empty one if it holds no JSON object."""
    try:
        found = json.loads(source.read_bytes() if isinstance(source, Path) else source)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _links(saved: Sequence[Path], shown: Sequence[Path], token: str) -> str:
    """Links to the samples of at most forty steps and to the latest samples."""
    steps = {path.stem: f"{int(path.stem.removeprefix('step-'))}" for path in saved[:: -(-len(saved) // 40) or 1]}
    links = [
        f"<b>{name}</b>"
        if [path.stem for path in shown] == [stem]
        else f"<a href='?token={token}&amp;samples={stem}'>{name}</a>"
        for stem, name in steps.items()
    ]
    return f"<nav>Samples of step {' '.join(links)} <a href='?token={token}'>latest</a></nav>" if len(saved) > 1 else ""


def application(run: Run, token: str) -> Any:
    """The view as a WSGI application with one page, which is shown only to requests with the token."""
    from werkzeug import Request, Response
    from werkzeug.wsgi import host_is_trusted

    def said(status: int, text: str) -> Response:
        return Response(f"{text}\n", status, _HEADERS, mimetype="text/plain")

    @Request.application
    def answer(request: Request) -> Response:
        if not host_is_trusted(request.headers.get("Host"), _NAMES):  # another site's name (DNS rebinding)
            return said(403, f"The view answers to {' and '.join(_NAMES)} only.")
        if not hmac.compare_digest(request.args.get("token", "").encode(), token.encode()):
            return said(403, "Open the whole address that the view has printed: it ends with a token.")
        if request.path != "/":
            return said(404, "There is only one page, /.")
        if request.method not in ("GET", "HEAD"):
            return said(405, "The view can only be read.")
        stamp = run.stamp()
        if request.if_none_match.contains(stamp):
            response = Response(status=304, headers=_HEADERS)
        else:
            response = Response(run.page(token, request.args.get("samples")), headers=_HEADERS, mimetype="text/html")
        response.set_etag(stamp)
        return response

    return answer


def listen(port: int) -> socket.socket:
    """Open a socket that only this machine can reach; port 0 takes any free port.

    Raises:
        ImportError: werkzeug is not installed.
        ValueError: the port number is out of range.
        OSError: the port cannot be opened.
    """
    if importlib.util.find_spec("werkzeug") is None:
        raise ImportError('the live view needs werkzeug; pip install -e ".[view]"')
    if not 0 <= port <= 65535:
        raise ValueError(f"the live view's port {port} must be 0 (any free one) to 65535")
    try:
        return socket.create_server((_NAMES[0], port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)  # the text of Python's exception would repeat the address
        raise OSError(f"the live view cannot use port {port} ({reason}); 0 takes any free one") from None


def address(listening: socket.socket, token: str) -> str:
    return f"http://{_NAMES[0]}:{listening.getsockname()[1]}/?token={token}"


def serve(folder: Path, listening: int, token: str) -> None:
    """Answer requests at a socket, given as a file descriptor, until the process ends."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            """Log nothing, because the addresses contain the token."""

    app = application(Run(folder), token)
    make_server(_NAMES[0], 0, app, threaded=True, request_handler=Quiet, fd=listening).serve_forever()


@contextmanager
def viewing(folder: str, port: int | None) -> Iterator[None]:
    """Serve the folder until the block or this process ends. Do nothing without a port and on ranks other than 0.

    The server is a process of its own, so that it does not compete with training for Python's lock. It ends when its
    standard input is closed, which happens even if this process is killed.
    """
    if port is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    token = secrets.token_urlsafe()
    with listen(port) as listening:
        code = f"from {__name__} import serve_for_parent; serve_for_parent()"
        child = subprocess.Popen(
            [sys.executable, "-c", code, folder, str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C must not reach it: the run still finishes its step
        )
        assert child.stdin
        with child:  # closes its input at the end
            child.stdin.write(f"{token}\n".encode())
            child.stdin.flush()
            print(f"live view: {address(listening, token)}", flush=True)
            yield


def serve_for_parent() -> None:
    """Serve in the process that `viewing` starts."""
    os.nice(10)  # training has priority
    token = sys.stdin.readline().strip()
    threading.Thread(target=serve, args=(Path(sys.argv[1]), int(sys.argv[2]), token), daemon=True).start()
    sys.stdin.read()


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bicot.view", description="Show a run live in a browser of this machine."
    )
    parser.add_argument("run", type=Path, help="the run's folder, its output_dir")
    parser.add_argument("--port", type=int, default=0, help="port to listen at; 0, the default, takes any free one")
    options = parser.parse_args(words)
    if not any((options.run / name).exists() for name in (".lock", *_NOW)):
        sys.exit(f"error: {options.run} is not the folder of a run: it has no metrics.jsonl")
    try:
        listening = listen(options.port)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    token = secrets.token_urlsafe()
    print(f"{address(listening, token)}\nCtrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        serve(options.run, listening.fileno(), token)
