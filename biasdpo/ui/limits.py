"""How much one visitor, and all of them, may ask of the app. The figures are in `biasdpo.config.ServeConfig`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import parse_qs

from gradio import Blocks
from gradio.context import LocalContext
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from biasdpo import access
from biasdpo.config import ServeConfig
from biasdpo.errors import RefusedError, plural
from biasdpo.workspace import is_public_space

log = logging.getLogger(__name__)

_SESSION_CHARACTERS = 64
_UNHEARD_SECONDS = 6.0  # a page opens its stream right after its request
_SWEEP_SECONDS = 1.0
_MINUTE = 60.0
_DAY = 86400.0
_SIGN_INS = 20  # per minute from one address
_BODY_SECONDS = 30.0  # between two parts of a body

signing_in_from: ContextVar[str] = ContextVar("signing_in_from", default="")
"""The address of the request that signs in: Gradio's `auth` gets name and password only."""


class DayBudget:
    """Bytes that each visitor has used today."""

    def __init__(self) -> None:
        self._used: Counter[str] = Counter()
        self._since = time.monotonic()
        self._lock = threading.RLock()

    def used(self, who: str) -> int:
        with self._lock:
            if time.monotonic() - self._since > _DAY:
                self._used.clear()
                self._since = time.monotonic()
            return self._used[who]

    def spend(self, who: str, size: int, most: int) -> bool:
        """Whether `who` may use `size` bytes more; if so, they are counted."""
        with self._lock:
            has_room = self.used(who) + size <= most
            if has_room:
                self._used[who] += size
            return has_room


class Limits:
    """Counts who asks, listens and stores. `refusal` is asked about every request, `check_stored` about every verdict; `watch`
    guards Gradio's queue."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self._listening: defaultdict[str, int] = defaultdict(int)  # streams by session
        self._heard: dict[str, float] = {}  # by session: when somebody last listened, or when it was first seen waiting
        self._arrivals: dict[tuple[str, str], deque[float]] = {}  # by address and what is limited: when it came
        self._lock = threading.Lock()  # of the arrivals: verdicts come from Gradio's threads
        self._uploaded, self._received, self._stored = DayBudget(), DayBudget(), DayBudget()
        self._has_strangers = bool(config.auth or config.public or is_public_space())
        self._sessions: dict[str, None] = {}  # known ones, in order of arrival
        self._queue: Any = None
        self._sweeper: asyncio.Task[None] | None = None

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the line that answer too large a body, or too many sign-ins or pages; None if the request may pass."""
        path = scope["path"].rstrip("/")
        if "/heartbeat/" in path:  # at its end, Gradio makes a state for the page
            refused = self._visit_refusal(path.rpartition("/")[2], client_address(HTTPConnection(scope)))
            return (429, refused) if refused else None
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        if path.endswith("/login"):
            signing_in_from.set(client_address(HTTPConnection(scope)))
            if self._comes_too_often(signing_in_from.get(), "sign in", _SIGN_INS):
                return 429, "Too many sign-ins from your address: wait a minute"
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if "transfer-encoding" in headers or not length.isdigit():  # of unknown length: browsers always say it
            return 411, "Send the length of the body (Content-Length) and no Transfer-Encoding"
        name = "upload" if path.endswith("/upload") else "request"
        most = self.config.max_upload_mb if name == "upload" else self.config.max_request_mb
        if int(length) > most * 2**20:
            return 413, f"This {name} has {int(length) / 2**20:.1f} MiB, at most {most} are allowed: send less (--max-{name}-mb)"
        return self._upload_refusal(scope, int(length)) if name == "upload" and self._has_strangers else None

    def _upload_refusal(self, scope: Scope, size: int) -> tuple[int, str] | None:
        own, everybody = self.config.max_uploads_mb_per_visitor, self.config.max_uploads_mb
        if self._received.used("all") + size > everybody * 2**20:
            return 429, f"All visitors have uploaded {everybody} MiB today: try again tomorrow (--max-uploads-mb)"
        if not self._uploaded.spend(client_address(HTTPConnection(scope)), size, own * 2**20):
            return 429, f"You may upload {own} MiB a day: try again tomorrow (--max-uploads-mb-per-visitor)"
        return None

    def receiving(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` for a body that comes at all, else the client counts as gone. Uploads are counted as they arrive: what a
        client only announces takes nothing from the others."""
        is_upload, is_whole = scope["path"].rstrip("/").endswith("/upload"), scope["method"] in ("GET", "HEAD")

        async def counted() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _BODY_SECONDS)
            except TimeoutError:
                return {"type": "http.disconnect"}
            is_whole = not message.get("more_body", False)
            if is_upload:
                self._received.spend("all", len(message.get("body", b"")), 2**63)
            return message

        return counted

    def check_stored(self, size: int, total: int) -> None:
        """Raise RefusedError if the visitor, or all together, have stored too many verdicts. `total`: bytes of all judgments."""
        who = access.caller()
        request = LocalContext.request.get(None)
        name = who.name or (client_address(request) if request is not None else "")
        if total + size > self.config.max_stored_mb * 2**20:
            raise RefusedError("The file of judgments is full, so only the owner can add to it (--max-stored-mb): tell the owner")
        if self._comes_too_often(name, "verdict", self.config.max_verdicts_per_minute):
            raise RefusedError(f"You have stored {self.config.max_verdicts_per_minute} verdicts within a minute: wait a minute")
        if not self._stored.spend(name, size, self.config.max_stored_mb_per_visitor * 2**20):
            most = self.config.max_stored_mb_per_visitor
            raise RefusedError(f"You may store {most} MiB of verdicts a day (--max-stored-mb-per-visitor): go on tomorrow")

    @contextmanager
    def listening(self, scope: Scope) -> Iterator[None]:
        """While the request listens to what the queue says to its session; other requests are let through."""
        if self._queue is not None and self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep(self._queue))
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
        session = body.session_hash  # None: a program's call, a session of its own; Gradio refuses it elsewhere
        if refused := self._visit_refusal(session, address):
            return refused
        if session is not None and all(event.session_hash != session for event in asked):
            self._heard[session] = time.monotonic()
        return ""

    def _visit_refusal(self, session: str | None, address: str) -> str:
        """Why a page may not be opened; "" if it may, or is known."""
        if session is not None and not 1 <= len(session) <= _SESSION_CHARACTERS:
            return f"A session_hash has 1 to {_SESSION_CHARACTERS} characters: got {len(session):,}; reload the page"
        if session is None or session not in self._sessions:
            if self._comes_too_often(address, "visit", self.config.max_visits_per_minute):
                pages = plural(self.config.max_visits_per_minute, "page")
                return f"Your address opened more than {pages} in a minute: wait a minute"
            if session is not None:
                self._sessions[session] = None
            while len(self._sessions) > self.config.max_sessions:
                del self._sessions[next(iter(self._sessions))]
        return ""

    def _comes_too_often(self, address: str, what: str, most: int) -> bool:
        """Whether an address has come `most` times within a minute; else it counts as having come once more."""
        with self._lock:
            arrivals, now = self._arrivals.setdefault((address, what), deque()), time.monotonic()
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
        known = asking | queue.pending_event_ids_session.keys()
        silent = {session: now - self._heard.setdefault(session, now) for session in known if not self._listening.get(session)}
        for session in [session for session, seconds in silent.items() if session not in asking and seconds > _MINUTE]:
            # Gradio keeps the first for ever, and what was never listened to for the last 2,000 sessions.
            queue.pending_event_ids_session.pop(session, None)
            queue.pending_messages_per_session.pop(session, None)
        self._heard = {session: at for session, at in self._heard.items() if session in known}
        with self._lock:
            self._arrivals = {who: times for who, times in self._arrivals.items() if times and now - times[-1] <= _MINUTE}
        for session in [session for session, seconds in silent.items() if session in asking and seconds >= _UNHEARD_SECONDS]:
            await queue.clean_events(session_hash=session)


def _requests(queue: Any) -> list[Any]:
    """What waits in the queue and what is being answered."""
    waiting = [event for events in queue.event_queue_per_concurrency_id.values() for event in events.queue]
    return waiting + [event for events in queue.active_jobs for event in events or () if event.alive]


def client_address(request: Any) -> str:
    """The address a request came from, as `counted_as` has it. uvicorn takes it from X-Forwarded-For if a trusted proxy sent it.
    On a Space, whose proxies have private addresses, it is the last public one: the visitor may have written others before it."""
    if is_public_space():
        for address in reversed(str(request.headers.get("x-forwarded-for", "")).split(",")):
            with suppress(ValueError):
                if ip_address(address.strip()).is_global:
                    return counted_as(address.strip())
    return counted_as(str(request.client.host)) if request.client else ""


@lru_cache(10_000)
def counted_as(host: str) -> str:
    """The address, or the network of an IPv6 address (/64): whoever has one of its addresses has them all."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ip_network((address, 64), strict=False))
