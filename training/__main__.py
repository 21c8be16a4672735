"""The training process as it is started: `accelerate launch -m training WORKSPACE/runs/ID`. The work is in `training.dpo`.

It says that it lives, and looks for a stop request, before the seconds that torch and TRL take to load.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from biasdpo.jobs.job import JobFolder
from training.callbacks import StatusWriter, StoppedError, cause_and_remedy, watch

# Of address space, never touched: thrown off where memory runs out, so that there is some to say so.
BALLAST_BYTES = 32 * 1024 * 1024


def writer_of(folder: JobFolder) -> StatusWriter:
    """This process's, by what the launcher tells it."""
    return StatusWriter(folder, rank=int(os.environ.get("RANK", "0")), processes=int(os.environ.get("WORLD_SIZE", "1")))


def main(folder: JobFolder, writer: StatusWriter | None = None) -> int:
    """Train one run to its end; every outcome is written to status.json. Returns the exit status."""
    writer = writer or writer_of(folder)
    ballast = [bytearray(BALLAST_BYTES)]
    try:
        writer.begin()
        writer.check_stop()
        from training.dpo import train

        train(folder, writer)
    except StoppedError:
        writer.end("stopped")
        return 0
    except Exception as exc:
        ballast.clear()
        with suppress(MemoryError):
            traceback.print_exc()
        writer.end("failed", cause_and_remedy(exc))
        return 1
    writer.end("finished")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: accelerate launch -m training WORKSPACE/runs/ID")
    faulthandler.enable()  # what a library's abort or segmentation fault was about, in the log
    own_writer = writer_of(JobFolder(Path(sys.argv[1]).resolve()))
    watch(own_writer)
    sys.exit(main(own_writer.folder, own_writer))
