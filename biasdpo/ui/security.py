"""Who may use the page: request checks that run before every route (hosts, calling pages), and who is asking.

Every website that a user visits can send requests to a server on 127.0.0.1. DNS rebinding (an attacker's host name that
resolves to 127.0.0.1) even makes the attacker's page same-origin with it, so the Host header must be a known name. Forms
and no-CORS requests need no preflight, so `Origin` and `Sec-Fetch-Site` must not belong to another site.
Non-browser clients (curl, gradio_client) send neither header and are let through.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.context import LocalContext
from gradio.routes import App, ORJSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from biasdpo.access import Caller, Role, hide_paths, is_owner
from biasdpo.accounts import Accounts
from biasdpo.errors import ConfigError
from biasdpo.ui.limits import Limits
from biasdpo.workspace import is_public_space

_ADDRESS = re.compile(
    r"(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_][a-z0-9._-]{0,252}))(?::(?P<port>[0-9]{1,5}))?", re.I | re.A
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_WILDCARDS = {"", "0.0.0.0", "::"}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Gradio's pages for developers, and what this page does not use, which would take memory and disk uncounted.
_CLOSED = ("/monitoring", "/monitoring/summary", "/openapi.json", "/component_server", "/deep_link", "/process_recording")
_HUB = "https://huggingface.co"  # a Space's page on the Hub embeds the app in a frame


class Address(NamedTuple):
    """Lowercase host name or IP address (without brackets), and the port if one was given."""

    name: str
    port: int | None

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port is None else f"{name}:{self.port}"


def parse_address(text: str) -> Address | None:
    """Parse `host[:port]` as written in a Host header; None if it is malformed."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    name = match["name"] or _ip_address(match["ipv6"])
    return Address(name.lower(), int(match["port"]) if match["port"] else None) if name else None


def _ip_address(text: str) -> str | None:
    """Canonical form of an IP address: no zone, IPv4-mapped IPv6 as IPv4; None if it is not an IP address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


@dataclass(frozen=True)
class AllowedHosts:
    """Hosts that the app answers to.

    own     names of this server, with any port, since tunnels and containers map ports. The IP address that a connection
            arrived on also counts, which covers all of the machine's addresses under a wildcard bind, even when they change.
    added   other hosts; an entry without a port matches any port
    """

    own: frozenset[str]
    added: frozenset[Address]

    def accept_host(self, host: Address, server: Address) -> bool:
        """Whether a server listening on `server` may answer a request for `host`."""
        if any(host.name == name and (port is None or host.port in (None, port)) for name, port in self.added):
            return True
        return self._is_own(host.name, server)

    def accept_origin(self, origin: str, host: Address, server: Address) -> bool:
        """Whether a page from `origin` may call the app: it must be the requested host or an allowed one."""
        scheme, separator, text = origin.partition("://")
        page = parse_address(text)
        if not separator or page is None or scheme not in _DEFAULT_PORTS:  # includes "null"
            return False
        port = page.port or _DEFAULT_PORTS[scheme]
        if page.name == host.name and port == (host.port or _DEFAULT_PORTS[scheme]):
            return True
        if page in self.added or Address(page.name, port) in self.added:
            return True
        return self._is_own(page.name, server) and port == server.port

    def _is_own(self, name: str, server: Address) -> bool:
        return name in self.own or name == server.name


def allowed_hosts(bound: str, names: Iterable[str] = ()) -> AllowedHosts:
    """Build the allow-list of a server bound to `bound`: its own names, `names` (--allowed-host), and a Space's own host."""
    own = set(_LOOPBACK)
    if bound not in _WILDCARDS:
        own.add(_ip_address(bound.strip("[]")) or bound.lower())
    added = [_added_address(name) for name in names]
    if is_public_space() and (space := parse_address(os.environ.get("SPACE_HOST", ""))):
        added.append(space)
    return AllowedHosts(frozenset(own), frozenset(added))


def _added_address(text: str) -> Address:
    address = parse_address(text) or parse_address(f"[{text}]")
    if address is None:
        raise ConfigError(
            f"--allowed-host must be a host name, with or without a port: got {text!r}; for example biasdpo.example.org"
        )
    return address


class Guard:
    """ASGI middleware that refuses cross-site requests with 403 and adds security headers to every response."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, limits: Limits) -> None:
        self.app = app
        self.hosts = hosts
        self.limits = limits
        frames = f"'self' {_HUB}" if is_public_space() else "'self'"
        self.headers = {
            "Content-Security-Policy": f"frame-ancestors {frames}",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request. Streamed chunks are forwarded as they arrive."""
        if scope["type"] not in ("http", "websocket"):  # lifespan
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})  # closed before it is accepted: the server answers 403
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        answer = (403, refusal) if refusal is not None else self.limits.refusal(scope)
        if answer is None and scope["path"].rstrip("/").endswith(_CLOSED):
            answer = (404, "Not Found")
        app = self.app if answer is None else PlainTextResponse(f"{answer[1]}\n", status_code=answer[0])
        with self.limits.listening(scope):
            await app(scope, self.limits.receiving(scope, receive), send_with_headers)

    def refusal(self, scope: Scope) -> str | None:
        """One-line reason to refuse a request; None if it may pass."""
        headers = Headers(scope=scope)
        name, port = scope.get("server") or ("", None)
        server = Address(_ip_address(name) or name, port)
        given = headers.getlist("host")
        host = parse_address(given[0]) if len(given) == 1 else None
        if host is None:
            return f"A request needs exactly one valid Host header: got {_shown(given)}; --allowed-host NAME allows another name"
        if not self.hosts.accept_host(host, server):
            return f"This app does not answer to the host {host}; to allow it, start app.py with --allowed-host {host}"
        origins = headers.getlist("origin")
        if origins:
            if len(origins) == 1 and self.hosts.accept_origin(origins[0], host, server):
                return None
            return (
                f"Pages from {_shown(origins)} may not call this app; if this is the app's own page behind a proxy, "
                "start app.py with --allowed-host and the proxy's host"
            )
        sites = headers.getlist("sec-fetch-site")
        if set(sites) <= {"same-origin", "none"} or _is_link(scope, headers):
            return None
        return f"Other sites may not call this app: got Sec-Fetch-Site {_shown(sites)}; they may only link to its page"


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether the request opens a page, by a link or in a frame. Gradio's API (streams, files, uploads) is not a page."""
    return (
        scope.get("method") in ("GET", "HEAD")
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") in ("document", "iframe")
        and "/gradio_api" not in scope["path"]
    )


def _shown(values: list[str]) -> str:
    """Header values as printable ASCII, truncated."""
    return ", ".join(ascii(value[:100]) for value in values[:3]) or "none"


class GuardedApp(App):
    """Gradio's app wrapped in a `Guard`.

    Middleware passed to Gradio (`app_kwargs`) runs inside Gradio's CORS middleware, which answers preflight requests itself.
    Wrapping the whole stack is the only way to run first.
    """

    def __init__(self, hosts: AllowedHosts, limits: Limits) -> None:
        self.hosts = hosts
        self.limits = limits
        super().__init__(default_response_class=ORJSONResponse)  # as in App.create_app

    def build_middleware_stack(self) -> ASGIApp:
        """Wrap the middleware stack of Gradio and Starlette."""
        return Guard(super().build_middleware_stack(), self.hosts, self.limits)


# Who is asking


@dataclass(frozen=True)
class Callers:
    """Finds out for whom Gradio runs a handler; `biasdpo.access` asks it.

    accounts   of an app started with --auth: a signed-in user has the role of their account
    public     started with --public: everybody is a visitor

    On a Space, its owner and the members of the organization that owns it are owners once they have signed in with the Hub, and
    everybody else is a visitor. Otherwise only this machine can reach the app, and who uses it is its owner.
    """

    accounts: Accounts | None = None
    public: bool = False

    def __call__(self) -> Caller:
        request = LocalContext.request.get(None)
        if request is None:  # the app itself, while the page is built or in a thread of its own
            return Caller()
        if self.accounts is not None:
            name = str(request.username or "")
            return Caller(self.accounts.role(name), name)
        if is_public_space():
            return _space_caller(request)
        return Caller(Role.visitor) if self.public else Caller()


def _space_caller(request: gr.Request) -> Caller:
    """The visitor of a Space by the session that Gradio's Hub sign-in has signed."""
    session = request.request.scope.get("session") if request.request is not None else None
    info = ((session or {}).get("oauth_info") or {}).get("userinfo") or {}
    name = str(info.get("preferred_username") or "")
    own = {name, *(str(one.get("preferred_username") or one.get("name")) for one in info.get("orgs") or [])}
    owner = os.environ.get("SPACE_AUTHOR_NAME", "")
    return Caller(Role.owner if owner and owner in own else Role.visitor, name)


_hides: ContextVar[bool] = ContextVar("hides", default=True)


class Page(gr.Blocks):
    """Gradio's Blocks; its values, errors and messages name no folder of this machine to anyone but the owner.

    left   called with the session of a visitor who left, or never listened: Gradio itself notices at a generator's next value
    """

    left: Sequence[Callable[[str], None]] = ()

    async def process_api(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Run a function of the page for whoever sent the request."""
        token = LocalContext.request.set(options.get("request"))
        _hides.set(not is_owner())
        LocalContext.request.reset(token)
        try:
            return await super().process_api(*args, **options)
        except gr.Error as exc:
            exc.message = _shown_to_caller(exc.message)
            raise

    async def postprocess_data(self, block_fn: BlockFunction, predictions: Any, *rest: Any) -> list[Any]:
        """The values that the page gets. Gradio would rebuild the component of each skipped output, which took most of the event
        loop's time under load. Here a skipped output costs nothing."""
        outputs = block_fn.outputs
        if isinstance(predictions, dict) and predictions and predictions.keys() <= set(outputs):
            given, values = copy(block_fn), list(predictions.values())
            given.outputs = [*predictions]
            found = await super().postprocess_data(given, values if len(values) > 1 else values[0], *rest)
            updates = dict(zip(predictions, found, strict=True))
            values = [updates[one] if one in updates else None if one.stateful else gr.skip() for one in outputs]
        else:
            values = await super().postprocess_data(block_fn, predictions, *rest)
        return list(_shown_to_caller(values))

    def queue(self, *args: Any, **options: Any) -> Page:
        """As in Gradio, with a queue that hides folders in `gr.Info` and `gr.Warning`, and says who has left."""
        super().queue(*args, **options)
        log_message, clean_events = self._queue.log_message, self._queue.clean_events

        def log_cleaned(event_id: str, log: str, *rest: Any, **more: Any) -> None:
            log_message(event_id, _shown_to_caller(log), *rest, **more)

        async def clean_and_tell(*, session_hash: str | None = None, event_id: str | None = None) -> None:
            await clean_events(session_hash=session_hash, event_id=event_id)
            for leave in self.left if session_hash else ():
                leave(session_hash or "")

        self._queue.log_message = log_cleaned  # type: ignore[method-assign]
        self._queue.clean_events = clean_and_tell  # type: ignore[method-assign]
        return self


def _shown_to_caller(value: Any) -> Any:
    return hide_paths(value) if _hides.get() else value
