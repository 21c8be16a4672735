"""The command `workspace`: backup, restore and verification."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from biasdpo.cli_options import JsonOption, WorkspaceOption, inherited_options, new_app, print_row
from biasdpo.migrations import open_workspace, workspace_root
from biasdpo.workspace import Workspace

workspaces = new_app("Backup, restore and verification of a workspace.")
workspaces.callback()(inherited_options)

FileArgument = Annotated[Path, Argument(metavar="FILE.tar.gz")]


@workspaces.command()
def backup(
    file: FileArgument,
    without: Annotated[
        str, Option(metavar="NAME[,NAME]", help="Leave out: cache, runs, evaluations, exports; or none of them.")
    ] = "cache",
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write a workspace to one file. An existing FILE is replaced."""
    from biasdpo.backup import back_up
    from biasdpo.jobs.store import list_jobs

    folder = open_workspace(workspace)
    files = back_up(folder, file, () if without == "none" else without.split(","))
    for job in list_jobs(folder):
        if job.is_active:
            print(f"{job.kind}/{job.id} is {job.state}: back up again when it has ended", file=sys.stderr)
    print_row({"file": str(file), "files": files}, f"{file}: {files:,} files of {folder.root}", as_json=as_json)


@workspaces.command()
def restore(file: FileArgument, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Unpack a backup into a new or empty workspace folder."""
    from biasdpo import backup

    root = workspace_root(workspace)
    files = backup.restore(file, root)
    print_row({"workspace": str(root), "files": files}, f"{root}: {files:,} files restored", as_json=as_json)


@workspaces.command()
def verify(workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Check the journal, the jobs, and the hashes of what they wrote; exit status 1 if there is a fault."""
    from biasdpo import backup

    root = workspace_root(workspace)
    faults = list(backup.verify(Workspace(root)))
    print_row({"workspace": str(root), "faults": faults}, "\n".join(faults) or f"{root}: no faults found", as_json=as_json)
    if faults:
        raise Exit(1)
