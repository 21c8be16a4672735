"""The commands `jobs`, over training runs, evaluations and exports, and `runs`, the same over training runs alone."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from biasdpo.cli_options import JsonOption, WorkspaceOption
from biasdpo.errors import ConfigError, plural

if TYPE_CHECKING:
    from biasdpo.jobs.job import Job

Action = Literal["list", "show", "stop", "resume", "delete", "note", "logs"]
KindName = Literal["train", "evaluate", "export"]
ActionArgument = Annotated[Action, typer.Argument(metavar="list|show|stop|resume|delete|note|logs")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="for all but list: an id, or KIND/ID where several jobs have it")]
TextArgument = Annotated[str | None, typer.Argument(metavar="TEXT", help="for note; an empty text removes it")]
KindOption = Annotated[KindName | None, typer.Option("--kind", help="only jobs of this kind")]
LinesOption = Annotated[int, typer.Option("--lines", min=1, metavar="N", help="for logs")]


def jobs(
    action: ActionArgument = "list",
    job_id: IdArgument = "",
    text: TextArgument = None,
    kind: KindOption = None,
    lines: LinesOption = 50,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """List, show, stop, resume, delete training runs, evaluations and exports, note something on one, or print its log."""
    _act(action, job_id, text, kind, lines, workspace, as_json=as_json, with_kind=True)


def runs(
    action: ActionArgument = "list",
    job_id: IdArgument = "",
    text: TextArgument = None,
    lines: LinesOption = 50,
    workspace: WorkspaceOption = "",
    as_json: JsonOption = False,
) -> None:
    """The same over training runs alone."""
    _act(action, job_id, text, "train", lines, workspace, as_json=as_json, with_kind=False)


def _act(
    action: Action,
    job_id: str,
    text: str | None,
    kind: KindName | None,
    lines: int,
    folder: str,
    *,
    as_json: bool,
    with_kind: bool,
) -> None:
    from biasdpo.jobs import store
    from biasdpo.jobs.job import NOUNS
    from biasdpo.migrations import open_workspace

    if bool(job_id) == (action == "list") or (text is None) == (action == "note"):
        needs = {"list": "no ID", "note": "an ID and a TEXT"}.get(action, "an ID alone")
        raise ConfigError(f"`{action}` takes {needs}: got {job_id or 'no ID'}{'' if text is None else f' and {text!r}'}")
    workspace = open_workspace(folder)

    def show(job: Job) -> None:
        print(json.dumps(job.to_json(), ensure_ascii=False) if as_json else f"{f'{job.kind}/' if with_kind else ''}{line(job)}")

    if action == "list":
        found = store.list_jobs(workspace, kind)
        for job in found:
            show(job)
        if not found and not as_json:
            noun = "jobs" if kind is None else f"{NOUNS[kind]}s"
            print(f"No {noun} yet: start one with `python -m biasdpo {kind or 'train'}`", file=sys.stderr)
    elif action == "show":
        show(job := store.find_job(job_id, workspace, kind))
        if not as_json:
            for note in (*job.status.notes, job.to_json()["note"], job.error, summary(job) if job.state == "finished" else ""):
                if note:
                    print(f"  {note}")
    elif action == "logs":
        log = store.find_job(job_id, workspace, kind).log_tail(lines)
        print(json.dumps({"id": job_id, "log": log.split("\n")}) if as_json else log)
    elif action == "delete":
        store.delete_job(job_id, workspace, kind)
        print(json.dumps({"id": job_id, "deleted": True}) if as_json else f"{job_id}: deleted")
    elif action == "note":
        show(store.write_note(job_id, workspace, text or "", kind))
    else:
        show((store.stop_job if action == "stop" else store.resume_job)(job_id, workspace, kind))


def line(job: Job) -> str:
    """One job in a line: id, state, progress; what is wrong with it."""
    status = job.status
    parts = [f"{job.id}: {status.state}"]
    if job.kind == "train":
        parts.append(f"step {status.step} of {status.total_steps}")
    elif job.kind == "evaluate" and status.progress:
        total = plural(sum(one.total for one in status.progress), "item")
        parts.append(f"{sum(one.done for one in status.progress):,} of {total}")
    elif job.kind == "export" and status.state == "running":
        parts.append(f"{100 * status.share:.0f}%")
    if status.eta_seconds and status.state == "running":
        parts.append(f"{status.eta_seconds:.0f} s left")
    if status.waits_for:
        parts.append(f"waits for {status.waits_for}")
    if status.state == "failed":
        parts.append(status.error)
    return ", ".join(parts)


def summary(job: Job) -> str:
    """The outcome of a finished job."""
    from biasdpo.jobs.outcome import held_out_metrics, outcome

    if job.kind != "train":
        return f"{job.kind}/{job.id}: finished, {job.file}"
    shown: dict[str, Any] = job.to_json()
    kept = shown["kept"].get("reason", "")
    text = f"Run {job.id}: finished, adapter in {job.folder.adapter}" + (f"\nKept: {kept}" if kept else "")
    return f"{text}\n{outcome(held_out_metrics(job))}"
