"""Connections that are opened and never used, or used by the drop: uvicorn limits neither, so its HTTP protocol is extended."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network
from typing import Any

import uvicorn.protocols.http.auto as uvicorn_http

from biasdpo.config import ServeConfig
from biasdpo.ui.limits import counted_as

_Protocol: Any = uvicorn_http.AutoHTTPProtocol
_HEADER_SECONDS = 10.0
_MOST_HALF_OPEN = 100


class LimitedProtocol(_Protocol):  # type: ignore[misc]
    """uvicorn's HTTP protocol with a time limit for a request's headers and limits on the number of connections.

    Only so many connections may be without a request: then the oldest of them is closed, so whoever asks at once always gets in.
    """

    limits = ServeConfig()
    half_open: dict[LimitedProtocol, asyncio.TimerHandle] = {}  # noqa: RUF012  # of the one server; in order of arrival

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_request()
        others = [one for one in self.connections if one is not self and not one.transport.is_closing()]
        host = self.client[0] if self.client is not None else ""
        own = sum(one.client is not None and counted_as(one.client[0]) == counted_as(host) for one in others)
        if own >= self.limits.max_connections_per_visitor and not _is_proxy(host, self.limits):
            self._close()
        elif len(others) >= self.limits.max_connections:
            next(iter(self.half_open))._close()  # perhaps this one

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_upgraded = self.transport.get_protocol() is not self
        if is_upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_waiting()
        elif self not in self.half_open and not self.transport.is_closing():
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        self.half_open[self] = self.loop.call_later(_HEADER_SECONDS, self.transport.abort)
        if len(self.half_open) > _MOST_HALF_OPEN:
            next(iter(self.half_open))._close()

    def _close(self) -> None:
        self._stop_waiting()  # at once: the connection is lost later, and others may come before that
        self.transport.abort()

    def _stop_waiting(self) -> None:
        if (timer := self.half_open.pop(self, None)) is not None:
            timer.cancel()


def limit_connections(config: ServeConfig) -> None:
    """Make the server that is started next limit its connections. Gradio passes no options to uvicorn."""
    LimitedProtocol.limits = config
    uvicorn_http.AutoHTTPProtocol = LimitedProtocol


def _is_proxy(host: str, config: ServeConfig) -> bool:
    """Whether many visitors come from this address."""
    try:
        return any(ip_address(host) in ip_network(proxy, strict=False) for proxy in config.trusted_proxies)
    except ValueError:
        return True
