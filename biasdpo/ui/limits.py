"""How much one visitor, and all of them, may ask of the app. The figures are in `biasdpo.config.ServeConfig`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

from gradio import Blocks
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope

from biasdpo.config import ServeConfig
from biasdpo.errors import plural
from biasdpo.workspace import is_public_space

log = logging.getLogger(__name__)

_UNHEARD_SECONDS = 8.0  # a page opens its stream right after its request
_SWEEP_SECONDS = 2.0
_MINUTE = 60.0
_SIGN_INS = 20  # per minute from one address


class Limits:
    """Counts who asks and who listens. `refusal` is asked about every request; `watch` guards Gradio's queue."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._listening: defaultdict[str, int] = defaultdict(int)  # streams by session
        self._heard: dict[str, float] = {}  # by session: when somebody last listened, or when it was first seen waiting
        self._arrivals: dict[tuple[str, int], deque[float]] = {}  # by address and limit: when it came
        self._sessions: dict[str, None] = {}  # known ones, in order of arrival
        self._queue: Any = None
        self._sweeper: asyncio.Task[None] | None = None

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the line that answer a request with too large a body, or too many sign-ins; None if it may pass."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        if scope["path"].rstrip("/").endswith("/login") and self._comes_too_often(
            client_address(HTTPConnection(scope)), _SIGN_INS
        ):
            return 429, "Too many sign-ins from your address: wait a minute"
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not length.isdigit():  # of unknown length: browsers always say it
            return 411, "Send the length of the body (Content-Length) and no Transfer-Encoding"
        name = "upload" if scope["path"].rstrip("/").endswith("/upload") else "request"
        most = self.config.max_upload_mb if name == "upload" else self.config.max_request_mb
        if int(length) > most * 2**20:
            return 413, f"This {name} has {int(length) / 2**20:.1f} MiB, at most {most} are allowed: send less (--max-{name}-mb)"
        return None

    @contextmanager
    def listening(self, scope: Scope) -> Iterator[None]:
        """While the request listens to what the queue says to its session; other requests are let through."""
        path, session = scope["path"].rstrip("/"), ""
        if path.endswith("/queue/data"):
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        elif "/call/" in path and scope["method"] == "GET" and self._queue is not None:
            event = self._queue.event_ids_to_events.get(path.rpartition("/")[2])
            session = event.session_hash if event is not None else ""
        if not session:
            yield
            return
        self._listening[session] += 1
        try:
            yield
        finally:
            self._heard[session] = time.monotonic()
            self._listening[session] -= 1
            if not self._listening[session]:
                del self._listening[session]

    def watch(self, blocks: Blocks) -> None:
        """Refuse what is too much for the queue, and drop the requests of pages that are gone."""
        queue: Any = blocks._queue  # Gradio has no public hook
        self._queue = queue
        push = queue.push

        async def guarded(body: Any, request: Any, username: str | None) -> Any:
            if refused := self._too_much(queue, body, request):
                return False, refused, "queue_full"
            self._sweeper = self._sweeper or asyncio.get_running_loop().create_task(self._sweep(queue))
            return await push(body=body, request=request, username=username)

        queue.push = guarded

    def count(self, blocks: Blocks) -> int:
        """Requests that wait or are being answered."""
        return len(_requests(blocks._queue))

    def _too_much(self, queue: Any, body: Any, request: HTTPConnection) -> str:
        """Why a request may not join the queue; "" if it may."""
        asked = _requests(queue)
        if len(asked) >= self.config.max_queue:
            return f"The app is busy with {plural(len(asked), 'request')}: try again in a minute"
        address = client_address(request)
        if sum(client_address(event.request) == address for event in asked) >= self.config.max_queue_per_visitor:
            return f"You have {plural(self.config.max_queue_per_visitor, 'request')} under way: wait until one is done"
        session = body.session_hash or ""
        if session not in self._sessions:
            if self._comes_too_often(address, self.config.max_visits_per_minute):
                pages = plural(self.config.max_visits_per_minute, "page")
                return f"Your address opened more than {pages} in a minute: wait a minute"
            self._sessions[session] = None
            while len(self._sessions) > self.config.max_sessions:
                del self._sessions[next(iter(self._sessions))]
        return ""

    def _comes_too_often(self, address: str, most: int) -> bool:
        """Whether an address has come `most` times within a minute; else it counts as having come once more."""
        arrivals, now = self._arrivals.setdefault((address, most), deque()), time.monotonic()
        while arrivals and now - arrivals[0] > _MINUTE:
            arrivals.popleft()
        if len(arrivals) >= most:
            return True
        arrivals.append(now)
        return False

    async def _sweep(self, queue: Any) -> None:
        """Drop what was asked by a client that left, or never listened."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                await self._drop_unheard(queue, time.monotonic())
            except Exception:
                log.exception("The queue could not be swept; trying again")

    async def _drop_unheard(self, queue: Any, now: float) -> None:
        asking = {event.session_hash for event in _requests(queue)}
        for session in asking:
            if self._listening.get(session) or now - self._heard.setdefault(session, now) < _UNHEARD_SECONDS:
                continue
            await queue.clean_events(session_hash=session)
        self._heard = {session: at for session, at in self._heard.items() if session in asking}
        self._arrivals = {address: times for address, times in self._arrivals.items() if times and now - times[-1] <= _MINUTE}


def _requests(queue: Any) -> list[Any]:
    """What waits in the queue and what is being answered."""
    waiting = [event for events in queue.event_queue_per_concurrency_id.values() for event in events.queue]
    return waiting + [event for events in queue.active_jobs for event in events or () if event.alive]


def client_address(request: Any) -> str:
    """The address a request came from. On a Space the Hub's proxy is in between, and says it first in X-Forwarded-For."""
    if is_public_space() and (forwarded := request.headers.get("x-forwarded-for")):
        return str(forwarded).partition(",")[0].strip()
    return request.client.host if request.client else ""
