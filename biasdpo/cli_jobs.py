"""The commands `jobs`, over all training runs, evaluations and exports, and `runs`, the same over training runs alone."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

if TYPE_CHECKING:
    from biasdpo.jobs.job import Job
    from biasdpo.workspace import Workspace

WorkspaceOption = Annotated[
    Optional[str], typer.Option("--workspace", metavar="DIR", help="default: $BIASDPO_WORKSPACE, else ./workspace")  # noqa: UP045
]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object (or one a line) on stdout")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="an id, or KIND/ID where several jobs have it")]
KindName = Literal["train", "evaluate", "export"]


def build_app(only: KindName | None = None) -> typer.Typer:
    """The subcommands over all jobs, or over those of one kind."""
    noun = "run" if only else "job"
    KindOption = Annotated[  # noqa: N806 (a type)
        Optional[KindName], typer.Option("--kind", hidden=only is not None, help="only jobs of this kind")  # noqa: UP045
    ]
    about = f"List, show, stop, resume, delete {'training runs' if only else 'training runs, evaluations and exports'}."
    app = typer.Typer(help=about, add_completion=False, rich_markup_mode=None, invoke_without_command=True)

    @app.callback()
    def choose(context: typer.Context, workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
        context.obj = {"workspace": workspace, "json": as_json}  # a subcommand's own options come first
        if context.invoked_subcommand is None:
            list_all(context)

    @app.command("list", help=f"all {noun}s, newest first")
    def list_all(
        context: typer.Context, kind: KindOption = None, workspace: WorkspaceOption = None, as_json: JsonOption = False
    ) -> None:
        from biasdpo.jobs.store import list_jobs

        found = list_jobs(_workspace(context, workspace), only or kind)
        for job in found:
            _print(context, job, as_json, with_kind=not only)
        if not found and not (as_json or context.obj["json"]):
            print(f"No {noun}s yet: start one with `python -m biasdpo {only or kind or 'train'}`", file=sys.stderr)

    @app.command(help=f"one {noun}: state, progress, config, results")
    def show(
        context: typer.Context,
        job_id: JobId,
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import find_job

        job = find_job(job_id, _workspace(context, workspace), only or kind)
        _print(context, job, as_json, with_kind=not only)
        if not (as_json or context.obj["json"]):
            for text in (*job.status.notes, job.to_json()["note"], job.error):
                if text:
                    print(f"  {text}")
            if job.state == "finished":
                print(summary(job))

    @app.command(help=f"ask a {noun} to stop: a run saves a checkpoint, an evaluation its scores; an export is killed")
    def stop(
        context: typer.Context,
        job_id: JobId,
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import stop_job

        _print(context, stop_job(job_id, _workspace(context, workspace), only or kind), as_json, with_kind=not only)

    @app.command(help=f"resume a {noun} that was stopped, interrupted or failed; returns at once")
    def resume(
        context: typer.Context,
        job_id: JobId,
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import resume_job

        _print(context, resume_job(job_id, _workspace(context, workspace), only or kind), as_json, with_kind=not only)

    @app.command(help=f"delete a {noun} that has ended, with all it made")
    def delete(
        context: typer.Context,
        job_id: JobId,
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import delete_job

        delete_job(job_id, _workspace(context, workspace), only or kind)
        wants_json = as_json or context.obj["json"]
        print(json.dumps({"id": job_id, "deleted": True}) if wants_json else f"{job_id}: deleted")

    @app.command(help=f"write a note on a {noun}; an empty text removes it")
    def note(
        context: typer.Context,
        job_id: JobId,
        text: Annotated[str, typer.Argument(metavar="TEXT")],
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import write_note

        _print(context, write_note(job_id, _workspace(context, workspace), text, only or kind), as_json, with_kind=not only)

    @app.command(help=f"the last lines of a {noun}'s log")
    def logs(
        context: typer.Context,
        job_id: JobId,
        lines: Annotated[int, typer.Option("--lines", min=1, metavar="N")] = 50,
        kind: KindOption = None,
        workspace: WorkspaceOption = None,
        as_json: JsonOption = False,
    ) -> None:
        from biasdpo.jobs.store import find_job

        log = find_job(job_id, _workspace(context, workspace), only or kind).log_tail(lines)
        print(json.dumps({"id": job_id, "log": log.split("\n")}) if as_json or context.obj["json"] else log)

    return app


jobs_app = build_app()
runs_app = build_app("train")


def _workspace(context: typer.Context, folder: str | None) -> "Workspace":
    from biasdpo.workspace import open_workspace

    return open_workspace(folder or context.obj["workspace"])


def _print(context: typer.Context, job: "Job", as_json: bool, *, with_kind: bool) -> None:
    if as_json or context.obj["json"]:
        print(json.dumps(job.to_json(), ensure_ascii=False))
    else:
        print(f"{f'{job.kind}/' if with_kind else ''}{line(job)}")


def line(job: "Job") -> str:
    """One job in a line: id, state, progress; what is wrong with it."""
    status = job.status
    parts = [f"{job.id}: {status.state}"]
    if job.kind == "train":
        parts.append(f"step {status.step} of {status.total_steps}")
    elif job.kind == "evaluate" and status.progress:
        parts.append(f"{sum(one.done for one in status.progress)} of {sum(one.total for one in status.progress)} items")
    elif job.kind == "export" and status.state == "running":
        parts.append(f"{100 * status.share:.0f} %")
    if status.eta_seconds and status.state == "running":
        parts.append(f"{status.eta_seconds:.0f} s left")
    if status.waits_for:
        parts.append(f"waits for {status.waits_for}")
    if status.state == "failed" and status.error:
        parts.append(status.error)
    return ", ".join(parts)


def summary(job: "Job") -> str:
    """What a finished job made."""
    if job.kind != "train":
        return f"{job.kind}/{job.id}: finished, {job.file}"
    shown: dict[str, Any] = job.to_json()
    kept = shown["kept"].get("reason", "")
    text = f"Run {job.id}: finished, adapter in {job.folder.adapter}" + (f"\nKept: {kept}" if kept else "")
    held_out = shown["metrics"].get("held_out")
    if held_out:
        text += (
            f"\nOn {held_out['pairs']} held-out pairs: reward accuracy {held_out['reward_accuracy']:.3f} (picking the longer: "
            f"{held_out['reward_accuracy_of_picking_the_longer']:.3f}), margin {held_out['reward_margin_nats']:.3g} nats, "
            f"length-normalised accuracy {held_out['length_normalised_accuracy_base']:.3f} -> "
            f"{held_out['length_normalised_accuracy_tuned']:.3f}"
        )
    return text


def main(arguments: list[str]) -> int:
    """Run `jobs ...` or `runs ...`; return the exit status. Raises BiasDPOError."""
    from typer.main import get_command

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.add_typer(jobs_app, name="jobs")
    app.add_typer(runs_app, name="runs")
    try:
        return int(get_command(app).main(arguments, prog_name="python -m biasdpo", standalone_mode=False) or 0)
    except Exception as exc:
        if not hasattr(exc, "format_message"):  # click's own: wrong use
            raise
        print(f"biasdpo: {exc.format_message()}", file=sys.stderr)
        return 2
