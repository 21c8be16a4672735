"""The training process as it is started: `accelerate launch -m training WORKSPACE/runs/ID`. The work is in `training.dpo`.

It says that it lives, and looks for a stop request, before the seconds that torch and TRL take to load.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from biasdpo.run_folder import RunFolder
from training.status import StatusWriter, StoppedError


def main(folder: RunFolder) -> int:
    """Train one run to its end; every outcome is written to status.json. Returns the exit status."""
    writer = StatusWriter(folder, rank=int(os.environ.get("RANK", "0")), processes=int(os.environ.get("WORLD_SIZE", "1")))
    try:
        writer.begin()
        writer.check_stop()
        from training.dpo import train

        train(folder, writer)
    except StoppedError:
        writer.end("stopped")
        return 0
    except Exception as exc:
        traceback.print_exc()
        from training.faults import cause_and_remedy

        writer.end("failed", cause_and_remedy(exc))
        return 1
    writer.end("finished")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: accelerate launch -m training WORKSPACE/runs/ID")
    sys.exit(main(RunFolder(Path(sys.argv[1]).resolve())))
