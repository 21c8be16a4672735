"""BiasDPO's page: python app.py; `--help` lists the options (biasdpo.config.ServeConfig).

The options are checked, then the page is served, then the model is loaded in the background. Exit status 2 and one line on stderr
if something is wrong with the options.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from biasdpo.cli_options import LogLevel, configure_logging, new_app, options_of, run
from biasdpo.config import ServeConfig
from biasdpo.data import journal, sync
from biasdpo.errors import ConfigError
from biasdpo.hub import require_token
from biasdpo.migrations import open_workspace
from biasdpo.workspace import PRIVACY, Workspace, is_zerogpu

if is_zerogpu():  # `spaces` patches torch, so it comes first; a ZeroGPU Space without a function of spaces.GPU does not start
    from biasdpo.backends.zerogpu import on_gpu  # noqa: F401

_PORTS_TRIED = 100
_LAST_SECONDS = 9.0

app = new_app()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl+C; return the exit status."""
    return run(app, arguments, "app.py", "python app.py")


@app.command(context_settings={"auto_envvar_prefix": "BIASDPO"})  # a Space gives no arguments, but has variables
@options_of(ServeConfig)
def serve_page(log_level: LogLevel = "warning", **options: Any) -> None:
    """See a language model's bias before and after DPO."""
    configure_logging(log_level)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Gradio's default; unless it is set, Gradio resolves it anew for every update of every component.
    os.environ.setdefault("GRADIO_TEMP_DIR", str((Path(tempfile.gettempdir()) / "gradio").resolve()))
    config = ServeConfig(**options)
    if config.sync:
        require_token(f"--sync {config.sync}")
    check_port(config.address, config.port)
    check_model(config.model, config.backend)
    if config.data_dir and not Path(config.data_dir).is_dir():
        raise ConfigError(f"--data-dir must be a folder of benchmark files: got {config.data_dir}; leave it out or name one")
    serve(config)


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where the page could not be served; before gradio's import, so that the answer is quick."""
    try:
        if is_free(host, port):
            return
    except OSError as exc:
        raise ConfigError(f"Can't serve on {host}:{port}: {exc.strerror or exc}; choose another --host or --port") from exc
    following = range(port + 1, min(port + 1 + _PORTS_TRIED, 65536))
    free = next((p for p in following if is_free(host, p)), None)
    remedy = "" if free is None else f", or use --port {free}"
    raise ConfigError(f"Port {port} is in use: stop the other program{remedy}")


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens there. Any other trouble than that (a bad host, a port that needs rights) is an OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def check_model(model: str, backend: str) -> None:
    """Raise the error of a model that isn't there, before a page is served that could show nothing else."""
    if model != "auto":
        from biasdpo import models
        from biasdpo.backends import choose_backend

        spec = models.find(model)
        if backend != "auto":
            choose_backend(spec, backend)


def serve(config: ServeConfig) -> None:
    """Serve the page until Ctrl+C or SIGTERM, with the workspace's labels synced if --sync says so."""
    workspace = open_workspace(config.workspace)
    journal.repair(workspace)  # a line that a power loss tore would keep other readers from the journal
    labels = sync.start(workspace, config.sync) if config.sync else None
    signal.signal(signal.SIGTERM, partial(_end, labels))
    try:
        with suppress(KeyboardInterrupt):  # Gradio catches it only once it waits
            serve_workspace(config, workspace, labels)
    finally:
        if labels:
            labels.close(_LAST_SECONDS)


def serve_workspace(config: ServeConfig, workspace: Workspace, labels: sync.HubSync | None) -> None:
    """Serve the page, then load the model, then wait."""
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(config.trusted_proxies)  # uvicorn's; it reads X-Forwarded-For from the right
    from fastapi.responses import FileResponse

    from biasdpo.backends import NO_LLAMA_CPP, has_llama_cpp
    from biasdpo.engines import EnginePool, Startup
    from biasdpo.jobs import memory
    from biasdpo.ui import build_ui, launch_options

    options = launch_options(config, workspace.root)
    pool = EnginePool(workspace, visitor_seconds=config.max_generation_seconds)
    memory.serve_requests(pool, workspace)
    startup = Startup(config.model, config.backend)
    demo = build_ui(pool, startup, Path(config.data_dir) if config.data_dir else None)

    def healthz() -> dict[str, Any]:
        state = labels.state() if labels else None
        counts = {"sent": state.sent, "unsent": state.unsent} if state else {}
        return {"ready": any(pool.opened()), "requests": options["_app"].limits.count(demo), **counts}

    options["_app"].add_api_route("/healthz", healthz)
    options["_app"].add_api_route("/privacy", lambda: FileResponse(PRIVACY, media_type="text/plain"))  # the consent text links it
    try:
        demo.launch(server_port=config.port, prevent_thread_lock=True, **options)
    except OSError as exc:  # taken between the check and here
        raise ConfigError(f"Can't serve on {config.address}:{config.port}: {exc}; choose another --port") from exc
    options["_app"].limits.watch(demo)
    print(f"BiasDPO is at {demo.local_url}  (Ctrl+C stops it; workspace: {workspace.root})", flush=True)
    if not has_llama_cpp():
        print(NO_LLAMA_CPP, flush=True)
    threading.Thread(target=startup.resolve, args=(pool,), name="startup", daemon=True).start()
    demo.block_thread()
    pool.close()


def _end(labels: sync.HubSync | None, *_: object) -> None:
    """On SIGTERM: as on Ctrl+C, and at the latest in a few seconds. Every stored verdict is on the disk already; jobs go on."""

    def leave() -> None:
        if labels:
            labels.close(0)
        os._exit(0)

    last = threading.Timer(_LAST_SECONDS, leave)
    last.daemon = True
    last.start()
    if labels:
        labels.hurry()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
