"""BiasDPO's page: python app.py [--model ID|auto] [--backend B] [--workspace DIR]
                       [--data-dir DIR] [--host H] [--port P] [--allowed-host NAME]

Flags, then the page, then the model: it is loaded in the background once the first page can be served.
Exit status 2 and one line on stderr where something is wrong with what was asked.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import sys
import threading
from pathlib import Path

from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.workspace import Workspace, is_public_space, open_workspace

_PORTS_TRIED = 100


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl+C; return the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        check_port(args.host, args.port)
        check_model(args.model, args.backend)
        if args.data_dir is not None and not args.data_dir.is_dir():
            raise ConfigError(f"--data-dir must be a folder of benchmark files: got {args.data_dir}; leave it out or name one")
        serve(args, open_workspace(args.workspace))
    except BiasDPOError as exc:
        print(f"app.py: {exc}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags (DESIGN, command line)."""
    parser = argparse.ArgumentParser(prog="app.py", description="See a language model's bias before and after DPO.")
    parser.add_argument("--model", default="auto", metavar="ID|auto", help="catalog id, Hub id, HF folder or .gguf")
    parser.add_argument("--backend", default="auto", choices=["auto", "llamacpp", "transformers"], help="default: auto")
    parser.add_argument("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="benchmark files: the Evaluate tab scores them; pairs that repeat their items are counted, to be left out",
    )
    everywhere = "0.0.0.0" if is_public_space() else "127.0.0.1"
    parser.add_argument("--host", default=everywhere, metavar="H", help=f"address to serve on; default: {everywhere}")
    parser.add_argument("--port", type=int, default=7860, metavar="P", help="default: 7860")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name to answer to (a reverse proxy's, this machine's name on the network), with or without a "
        "port; repeatable",
    )
    return parser


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where the page could not be served; before gradio's import, so that the answer is quick."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535: got {port}; leave it out for 7860")
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


def serve(args: argparse.Namespace, workspace: Workspace) -> None:
    """Serve the page, then load the model, then wait."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from biasdpo.data import journal
    from biasdpo.engines import EnginePool
    from biasdpo.jobs import memory
    from biasdpo.ui import build_ui, launch_options
    from biasdpo.ui.compare import Startup

    options = launch_options(args.host, args.allowed_host)
    journal.repair(workspace)  # a line that a power loss tore would keep other readers from the journal
    pool = EnginePool(workspace)
    memory.serve_requests(pool, workspace)
    startup = Startup(args.model, args.backend)
    demo = build_ui(pool, startup, args.data_dir)
    try:
        demo.launch(server_port=args.port, prevent_thread_lock=True, **options)
    except OSError as exc:  # taken between the check and here
        raise ConfigError(f"Can't serve on {args.host}:{args.port}: {exc}; choose another --port") from exc
    print(f"BiasDPO is at {demo.local_url}  (Ctrl+C stops it; workspace: {workspace.root})", flush=True)
    threading.Thread(target=startup.resolve, args=(pool,), name="startup", daemon=True).start()
    demo.block_thread()
    pool.close()


if __name__ == "__main__":
    sys.exit(main())
