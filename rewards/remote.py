"""A reward on an HTTP server, which gets pictures, prompts and plans as JSON, and returns scores.

    POST url    {"images": [PNG in base64, …], "prompts": [str, …], "plans": [str, …], "examples": [object, …]}
    200         {"scores": [number or null, …]}

All lists have one entry for each sample. An example is its line of the prompt file, with the user's own keys. A score
of null means that the reward does not apply. Pictures have 8 bits per channel. Before a run there is one request
without samples, which the server answers with {"scores": []}. A failed connection, a timeout, 429 and 5xx are retried.
Any other error status means that the request is wrong. The user sees the body of an error. examples/reward_server.py
is such a server.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from ..kernels.host import upload
from .base import Example, Unavailable

LONGEST_ANSWER = 2**26  # bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before a retry; each wait is twice the previous one
FLOAT_MAX = torch.finfo(torch.float32).max


class HttpReward:
    """Gets its scores from a server. Proxies of the environment are not used.

    Args:
        name: name of the reward.
        url: address of the server.
        timeout: maximum seconds to wait for a connection, and for an answer.
        retries: number of tries after the first one.

    Raises:
        ValueError: an argument is out of range, or the server does not follow the protocol.
        Unavailable: the server does not answer.
    """

    def __init__(self, name: str, url: str, *, timeout: float = 30.0, retries: int = 3) -> None:
        self.name, self.url, self.timeout, self.retries = name, url, timeout, retries
        if not _is_url(url):
            raise ValueError(f"reward {name!r}: url={url!r} must be like http://127.0.0.1:8000")
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= 86400:
            raise ValueError(f"reward {name!r}: timeout={timeout!r} must be seconds, above 0 and at most a day")
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"reward {name!r}: retries={retries!r} must be a whole number, 0 or more")
        self._opener = build_opener(_NoRedirect, ProxyHandler({}))
        try:
            self._ask([], [])
        except (ValueError, Unavailable) as error:
            kind = Unavailable if isinstance(error, Unavailable) else ValueError
            raise kind(f"reward {name!r}: {error}") from error

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """images [S, 3, H, W] in [0, 1], S examples -> [S] float32 on the device of `images`, NaN = does not apply.

        Raises:
            Unavailable: the server cannot be reached or does not answer, after all tries.
            ValueError: another HTTP error, or an answer that does not follow the protocol.
        """
        pixels = images.nan_to_num().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return upload(self._ask([base64.b64encode(_png(p)).decode() for p in pixels], examples), images.device)

    def _ask(self, images: list[str], examples: Sequence[Example]) -> list[float]:
        prompts, plans = [example.prompt for example in examples], [example.plan for example in examples]
        asked = {"images": images, "prompts": prompts, "plans": plans, "examples": [e.as_line() for e in examples]}
        return _scores(self._post(json.dumps(asked).encode()), len(images), self.url)

    def _post(self, body: bytes) -> bytes:
        request = Request(self.url, body, {"Content-Type": "application/json"})
        for tried in range(self.retries + 1):
            if tried:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tried - 1)))
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return _read(answer, time.monotonic() + self.timeout)
            except HTTPError as error:
                with error:
                    problem = f"{self.url} answers {_told(error)}"
                if error.code != 429 and error.code < 500:
                    raise ValueError(problem) from error
            except TimeoutError:
                problem = f"{self.url} gives no answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:
                problem = f"{self.url} cannot be reached: {getattr(error, 'reason', error)}"
        raise Unavailable(f"{problem} (tries: {self.retries + 1})")


def _read(answer: HTTPResponse, deadline: float) -> bytes:
    """The body of an answer.

    Raises:
        TimeoutError: it is not complete at the deadline. (The socket's own timeout is that of each read.)
        IncompleteRead: it is shorter than its length says.
        ValueError: it is longer than any scores can be.
    """
    body = b""
    while part := answer.read1(1 << 16):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(body) > LONGEST_ANSWER:
            raise ValueError(f"{answer.url} answers with more than {LONGEST_ANSWER >> 20} MiB")
    if answer.length:
        raise IncompleteRead(body, answer.length)
    return body


class _NoRedirect(HTTPRedirectHandler):
    """Makes a redirect an error: depending on the server, a redirected POST becomes a GET."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _is_url(url: Any) -> bool:
    try:
        parts = urlsplit(url) if isinstance(url, str) and url.isascii() and url.isprintable() else None
        return (
            bool(parts and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0) and " " not in url
        )
    except ValueError:  # no port
        return False


def _told(error: HTTPError) -> str:
    """The status of an error, the target of a redirect, and the beginning of the body."""
    place = error.headers.get("Location")
    try:
        text = " ".join(error.read(1000).decode(errors="replace").split())
    except (OSError, HTTPException):
        text = ""
    return (
        f"{error.code} {error.reason}" + (f", a redirect to {place}" if place else "") + f": {text:.200}" * bool(text)
    )


def _png(pixels: Any) -> bytes:
    """[H, W, 3] uint8 as the bytes of a PNG file."""
    from PIL import Image  # a dependency of matplotlib; imported here, so that other rewards need only torch

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _scores(body: bytes, count: int, url: str) -> list[float]:
    """The scores of an answer, NaN for null. Raises ValueError that says what is wrong."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url} does not answer with JSON: {body[:80]!r}") from error
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f'{url} must answer {{"scores": [...]}}, not {body[:80]!r}')
    if len(scores) != count:
        raise ValueError(f"{url} answers {len(scores)} scores for {count} pictures")
    for score in scores:
        if score is not None and (type(score) not in (int, float) or not abs(score) <= FLOAT_MAX):
            raise ValueError(f"{url} answers {score!r:.80} as a score, which must be a finite number or null")
    return [torch.nan if score is None else float(score) for score in scores]
