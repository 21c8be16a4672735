"""Entry point of the training process: `accelerate launch -m training WORKSPACE/runs/ID`. The work is in `training.dpo`.

Reports that it is alive, and watches for a stop request, before torch and TRL load, which takes seconds.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from biasdpo.jobs.job import JobFolder
from training.status import StatusWriter, StoppedError, cause_and_remedy, watch_for_stop

logger = logging.getLogger(__name__)

RESERVED_BYTES = 32 * 1024 * 1024  # address space, never touched: freed when memory runs out, so that the error can be reported


def main(folder: JobFolder, writer: StatusWriter | None = None) -> int:
    """Train one run to its end and write the outcome to status.json. Returns the exit status."""
    writer = writer or StatusWriter(folder)
    reserved = [bytearray(RESERVED_BYTES)]
    try:
        writer.begin()
        writer.check_stop()
        from training.dpo import train

        train(folder, writer)
    except StoppedError:
        writer.end("stopped")
        return 0
    except Exception as exc:
        reserved.clear()
        with suppress(MemoryError):
            logger.exception("The training failed")
        writer.end("failed", cause_and_remedy(exc))
        return 1
    writer.end("finished")
    return 0


def configure_logging(run_id: str) -> None:
    """Log our own messages from INFO on, and everyone else's warnings, to stderr, which is the run's log."""
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s [{run_id}] %(message)s")
    for name in ("biasdpo", "training"):
        logging.getLogger(name).setLevel(logging.INFO)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: accelerate launch -m training WORKSPACE/runs/ID")
    faulthandler.enable()  # logs the stack when a library aborts or crashes
    run_folder = JobFolder(Path(sys.argv[1]).resolve())
    configure_logging(run_folder.id)
    own_writer = StatusWriter(run_folder, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    watch_for_stop(own_writer)
    sys.exit(main(run_folder, own_writer))
