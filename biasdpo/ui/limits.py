"""How much one visitor, and all of them, may ask of the app. The figures are in `biasdpo.config.ServeConfig`."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from gradio import Blocks
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope

from biasdpo.config import ServeConfig
from biasdpo.workspace import is_public_space

_UNHEARD_SECONDS = 8.0  # a page opens its stream right after its request
_SWEEP_SECONDS = 2.0
_MINUTE = 60.0


class Limits:
    """Counts who asks and who listens. `refusal` is asked about every request; `watch` guards Gradio's queue."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._listening: defaultdict[str, int] = defaultdict(int)  # streams by session
        self._heard: dict[str, float] = {}  # by session: when somebody last listened, or when it was first seen waiting
        self._arrivals: defaultdict[str, deque[float]] = defaultdict(deque)  # by address: when new sessions came
        self._sessions: dict[str, None] = {}  # known ones, in order of arrival

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the line that answer a request with too large a body; None if it may pass."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdigit():  # of unknown length: browsers always say it
            return 411, "Send the length of the body (Content-Length)"
        name = "upload" if scope["path"].rstrip("/").endswith("/upload") else "request"
        most = self.config.max_upload_mb if name == "upload" else self.config.max_request_mb
        if int(length) > most * 2**20:
            return 413, f"This {name} has {int(length) / 2**20:.1f} MiB, at most {most} are allowed: send less (--max-{name}-mb)"
        return None

    def listens(self, scope: Scope) -> _Listening | None:
        """A context during which the request listens to what the queue says; None for other requests."""
        session = ""
        if scope["path"].endswith("/queue/data"):
            session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        elif "/call/" in scope["path"] and scope["method"] == "GET":
            session = scope["path"].rstrip("/").rpartition("/")[2]
        return _Listening(self, session) if session else None

    def watch(self, blocks: Blocks) -> None:
        """Refuse what is too much for the queue, and drop what a page asked that is gone."""
        queue: Any = blocks._queue  # Gradio has no public hook
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

    _sweeper: asyncio.Task[None] | None = None

    def _too_much(self, queue: Any, body: Any, request: HTTPConnection) -> str:
        """Why a request may not join the queue; "" if it may."""
        asked = _requests(queue)
        if len(asked) >= self.config.max_queue:
            return f"The app is busy with {len(asked)} requests: try again in a minute"
        address = client_address(request)
        if sum(client_address(event.request) == address for event in asked) >= self.config.max_queue_per_visitor:
            return f"You have {self.config.max_queue_per_visitor} requests under way: wait until one is done"
        session = body.session_hash or ""
        if session not in self._sessions:
            arrivals, now = self._arrivals[address], time.monotonic()
            while arrivals and now - arrivals[0] > _MINUTE:
                arrivals.popleft()
            if len(arrivals) >= self.config.max_visits_per_minute:
                return f"More than {self.config.max_visits_per_minute} pages were opened from your address: wait a minute"
            arrivals.append(now)
            self._sessions[session] = None
            while len(self._sessions) > self.config.max_sessions:
                del self._sessions[next(iter(self._sessions))]
        return ""

    async def _sweep(self, queue: Any) -> None:
        """Drop what was asked by a client that left, or never listened."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = time.monotonic()
            asking = {event.session_hash for event in _requests(queue)}
            for session in asking:
                if self._listening.get(session) or now - self._heard.setdefault(session, now) < _UNHEARD_SECONDS:
                    continue
                await queue.clean_events(session_hash=session)
                self._heard.pop(session, None)
            self._heard = {session: at for session, at in self._heard.items() if session in asking}
            for address, arrivals in list(self._arrivals.items()):
                if not arrivals or now - arrivals[-1] > _MINUTE:
                    del self._arrivals[address]


class _Listening:
    def __init__(self, limits: Limits, session: str) -> None:
        self.limits, self.session = limits, session

    def __enter__(self) -> None:
        self.limits._listening[self.session] += 1

    def __exit__(self, *_: object) -> None:
        self.limits._heard[self.session] = time.monotonic()
        self.limits._listening[self.session] -= 1
        if not self.limits._listening[self.session]:
            with suppress(KeyError):
                del self.limits._listening[self.session]


def _requests(queue: Any) -> list[Any]:
    """What waits in the queue and what is being answered."""
    waiting = [event for events in queue.event_queue_per_concurrency_id.values() for event in events.queue]
    return waiting + [event for events in queue.active_jobs for event in events or () if event.alive]


def client_address(request: Any) -> str:
    """The address a request came from. On a Space the Hub's proxy is in between, and says it first in X-Forwarded-For."""
    if is_public_space() and (forwarded := request.headers.get("x-forwarded-for")):
        return str(forwarded).partition(",")[0].strip()
    return request.client.host if request.client else ""
