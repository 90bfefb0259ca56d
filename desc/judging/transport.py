"""One call to a server: where it goes, how long it may take, and what may be said of it."""

import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from email.utils import parsedate_to_datetime

from huggingface_hub.utils import get_session

from desc import DescError

LONGEST_BODY = 10_000_000  # bytes; no chat completion is longer


class BadStatus(Exception):
    """The server answered with a status that is no success."""

    def __init__(self, status: int, complaint: str, seconds: float = 0.0):
        super().__init__(status)
        self.status = status
        self.complaint = complaint  # in the server's words
        self.seconds = seconds  # that it asks to wait


def read_key() -> str | None:
    """The key in $DESC_API_KEY. Raises DescError if no header can hold it."""
    key = os.environ.get("DESC_API_KEY", "")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise DescError(
            "$DESC_API_KEY holds a line break, a blank or a character that no key has: set it again"
        )
    return key or None


def find_address(url: str) -> tuple[str, str]:
    """(the address of chat completions, what messages call the server) of an --endpoint.

    The path may leave out "/v1". Messages name the host alone, because a path may hold a key.
    Raises DescError if it is no such URL."""
    try:
        parsed = get_session().build_request("POST", url).url
    except Exception:  # the client's errors for this have no common class
        parsed = None
    if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
        raise DescError("--endpoint should be a URL such as http://127.0.0.1:8000/v1")
    if parsed.userinfo or "?" in url or "#" in url:
        raise DescError(
            "--endpoint should have no user, password or query, because config.json keeps it: a key"
            " is read from $DESC_API_KEY alone"
        )
    address = url.rstrip("/")
    if not address.endswith("/chat/completions"):
        address += "/chat/completions" if address.endswith("/v1") else "/v1/chat/completions"
    return address, f"{parsed.scheme}://{parsed.netloc.decode()}"


def post(address: str, headers: dict[str, str], body: dict, timeout: float) -> bytes:
    """The body of the server's answer to one call, which may take `timeout` seconds in all.

    Redirects are not followed, because they could lead a seeker's words to another host. Raises
    BadStatus, TimeoutError, or the client's errors if the server cannot be reached."""
    return run_within(timeout, post_once, address, headers, body, timeout)


def post_once(address: str, headers: dict[str, str], body: dict, timeout: float) -> bytes:
    """post, but that the server may take longer if it sends its headers byte by byte."""
    deadline = time.monotonic() + timeout
    sent = json.dumps(body).encode()
    session = get_session()
    received = bytearray()
    with session.stream(
        "POST", address, content=sent, headers=headers, timeout=timeout, follow_redirects=False
    ) as response:
        for part in response.iter_bytes():
            received += part
            if len(received) > LONGEST_BODY:
                raise ValueError("too long")
            if time.monotonic() > deadline:
                raise TimeoutError
    complaint = received.decode(errors="replace")
    if response.next_request:
        to = response.next_request.url
        complaint = (
            f"it redirects to {to.scheme}://{to.netloc.decode()}{to.path}, which is not"
            " followed; give the right address as --endpoint"
        )
    if not response.is_success:
        seconds = read_seconds(response.headers.get("Retry-After"))
        raise BadStatus(response.status_code, complaint, seconds)
    return bytes(received)


def run_within(seconds: float, function: Callable, *args):
    """What function(*args) returns or raises, or TimeoutError after so many seconds.

    It runs in a thread of its own, because no timeout of the client bounds a server that sends its
    headers byte by byte. After the time the thread is left alone; it keeps no program from
    ending."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def read_seconds(retry_after: str | None) -> float:
    """How long to wait according to a Retry-After: a number of seconds or a date. 0 if it is
    neither."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0
