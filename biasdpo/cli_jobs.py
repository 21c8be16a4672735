"""The command `runs`: list, show, stop, delete training runs, or write a note on one."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Context

from biasdpo.cli_options import JsonOption, WorkspaceOption, inherited_options, new_app, print_row
from biasdpo.workspace import open_workspace

runs = new_app("List, show, stop and delete training runs, or write a note on one.", invoke_without_command=True)
RunId = Annotated[str, Argument(metavar="ID", help="The run's name.")]


@runs.callback()
def _runs(context: Context, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    inherited_options(context, workspace, as_json)
    if context.invoked_subcommand is None:
        list_runs(workspace, as_json)


@runs.command("list")
def list_runs(workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """List all runs, newest first."""
    import sys

    from biasdpo.runs import list_runs

    found = list_runs(open_workspace(workspace))
    for run in found:
        _print(run, as_json)
    if not found and not as_json:
        print("No runs yet: start one with `python -m biasdpo train`", file=sys.stderr)


@runs.command("show")
def show_run(run_id: RunId, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Show one run: state, step, config, metrics."""
    from biasdpo.runs import show

    run = show(run_id, open_workspace(workspace))
    notes = [f"  {note}" for note in (*run.status.notes, run.folder.read_note(), run.status.error) if note]
    summary = [run_summary(run)] if run.status.state == "finished" else []
    print_row(run.to_json(), lambda: "\n".join([_line(run), *notes, *summary]), as_json=as_json)


@runs.command("stop")
def stop_run(run_id: RunId, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Ask a run to stop after its current step, with a checkpoint. Returns at once."""
    from biasdpo.runs import stop

    _print(stop(run_id, open_workspace(workspace)), as_json)


@runs.command("delete")
def delete_run(run_id: RunId, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Delete a run that has ended, with its adapter."""
    from biasdpo.runs import delete

    delete(run_id, open_workspace(workspace))
    print_row({"id": run_id, "deleted": True}, lambda: f"{run_id}: deleted", as_json=as_json)


@runs.command("note")
def note_run(
    run_id: RunId,
    text: Annotated[str, Argument(metavar="TEXT", help="The note. An empty text removes it.")],
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write a note on a run."""
    from biasdpo.runs import show, write_note

    folder = open_workspace(workspace)
    write_note(run_id, folder, text)
    _print(show(run_id, folder), as_json)


def run_summary(run: Any) -> str:
    """Where a finished run's adapter is, and its results on the held-out pairs."""
    row = run.to_json()
    lines = [f"Run {run.folder.id}: finished, adapter in {run.folder.adapter}"]
    if kept := row["kept"].get("reason", ""):
        lines.append(f"Kept: {kept}")
    if held_out := row["metrics"].get("held_out"):
        lines.append(
            f"On {held_out['pairs']} held-out pairs: reward accuracy {held_out['reward_accuracy']:.3f} (picking the longer: "
            f"{held_out['reward_accuracy_of_picking_the_longer']:.3f}), margin {held_out['reward_margin_nats']:.3g} nats, "
            f"length-normalized accuracy {held_out['length_normalised_accuracy_base']:.3f} -> "
            f"{held_out['length_normalised_accuracy_tuned']:.3f}"
        )
    return "\n".join(lines)


def _print(run: Any, as_json: bool) -> None:
    print_row(run.to_json(), lambda: _line(run), as_json=as_json)


def _line(run: Any) -> str:
    status = run.status
    eta = f", {status.eta_seconds:.0f} s left" if status.eta_seconds and status.state == "running" else ""
    waits = f", waits for {status.waits_for}" if status.waits_for else ""
    return f"{run.folder.id}: {status.state}, step {status.step} of {status.total_steps}{eta}{waits}"
