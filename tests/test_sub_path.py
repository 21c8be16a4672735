"""The app below a path of another server, as docs/reverse-proxy.md describes it."""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.app_process import running_app

PREFIX = "/tools/bias"


class Proxy(BaseHTTPRequestHandler):
    """Passes what is below PREFIX on to the app, piece by piece, with its headers."""

    app_port = 0

    def pass_on(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection("127.0.0.1", self.app_port, timeout=30)
        with closing(connection), suppress(OSError, http.client.HTTPException):  # a stream ends when either side goes
            connection.request(self.command, self.path.removeprefix(PREFIX), body, dict(self.headers))
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)

    do_GET = do_POST = pass_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def proxy_of(app: str) -> Iterator[str]:
    handler = type("ProxyOfApp", (Proxy,), {"app_port": urlsplit(app).port})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}/"
        server.shutdown()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def test_the_page_and_its_functions_work_below_a_path(tmp_path: Path) -> None:
    from gradio_client import Client

    with running_app(tmp_path, GRADIO_ROOT_PATH=PREFIX) as app, proxy_of(app) as url:
        assert json.loads(get(f"{url}config"))["root"] == url.rstrip("/")
        script = re.search(r'src="\./(assets/[^"]+\.js)"', get(url))
        assert script is not None
        assert get(url + script[1])
        with closing(Client(url, verbose=False)) as client:
            client.predict(api_name="/stop")  # joins the queue and reads the stream
