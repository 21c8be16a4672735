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
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from biasdpo.cli_options import LogLevel, configure_logging, new_app, options_of, run
from biasdpo.config import ServeConfig
from biasdpo.errors import ConfigError
from biasdpo.migrations import open_workspace
from biasdpo.workspace import PRIVACY

_PORTS_TRIED = 100
_LAST_SECONDS = 8.0

app = new_app()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl+C; return the exit status."""
    return run(app, arguments, "app.py", "python app.py")


@app.command()
@options_of(ServeConfig)
def serve_page(log_level: LogLevel = "warning", **options: Any) -> None:
    """See a language model's bias before and after DPO."""
    configure_logging(log_level)
    config = ServeConfig(**options)
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
    """Serve the page, then load the model, then wait."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["FORWARDED_ALLOW_IPS"] = ",".join(config.trusted_proxies)  # uvicorn's; it reads X-Forwarded-For from the right
    from fastapi.responses import FileResponse

    from biasdpo.data import journal
    from biasdpo.engines import EnginePool, Startup
    from biasdpo.jobs import memory
    from biasdpo.ui import build_ui, launch_options

    workspace = open_workspace(config.workspace)
    options = launch_options(config, workspace.root)
    journal.repair(workspace)  # a line that a power loss tore would keep other readers from the journal
    pool = EnginePool(workspace, visitor_seconds=config.max_generation_seconds)
    memory.serve_requests(pool, workspace)
    startup = Startup(config.model, config.backend)
    demo = build_ui(pool, startup, Path(config.data_dir) if config.data_dir else None)

    def healthz() -> dict[str, Any]:
        return {"ready": any(pool.opened()), "requests": options["_app"].limits.count(demo)}

    options["_app"].add_api_route("/healthz", healthz)
    options["_app"].add_api_route("/privacy", lambda: FileResponse(PRIVACY, media_type="text/plain"))  # the consent text links it
    signal.signal(signal.SIGTERM, _end)
    try:
        demo.launch(server_port=config.port, prevent_thread_lock=True, **options)
    except OSError as exc:  # taken between the check and here
        raise ConfigError(f"Can't serve on {config.address}:{config.port}: {exc}; choose another --port") from exc
    options["_app"].limits.watch(demo)
    print(f"BiasDPO is at {demo.local_url}  (Ctrl+C stops it; workspace: {workspace.root})", flush=True)
    threading.Thread(target=startup.resolve, args=(pool,), name="startup", daemon=True).start()
    demo.block_thread()
    pool.close()


def _end(*_: object) -> None:
    """On SIGTERM: as on Ctrl+C, and at the latest in a few seconds. Every stored verdict is on the disk already; jobs go on."""
    last = threading.Timer(_LAST_SECONDS, os._exit, (0,))
    last.daemon = True
    last.start()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
