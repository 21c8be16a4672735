"""Shared parts of the commands: options generated from the config models, exit statuses, one line for whatever is wrong."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from biasdpo.config import Setting, Settings
from biasdpo.errors import BiasDPOError

WorkspaceOption = Annotated[
    str, typer.Option("--workspace", metavar="DIR", help="Workspace folder. [default: $BIASDPO_WORKSPACE, else ./workspace]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, or one per line, on stdout.")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], typer.Option("--log-level", help="Least severe messages to log on stderr.")
]


def new_app(help: str | None = None, **options: Any) -> typer.Typer:
    """A group of commands, without shell completion, colors and boxes."""
    return typer.Typer(
        help=help,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        **options,
    )


def inherited_options(context: typer.Context, workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """Options that may stand before an action, too: `dataset --json stats`."""
    given = {"workspace": workspace, "as_json": as_json}
    context.default_map = dict.fromkeys(context.command.list_commands(context), given)  # type: ignore[attr-defined]


def options_of(model: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for every setting of a config model to a command, which gets the parsed values of those that were given as
    keyword arguments."""
    settings = model.settings()

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            for name, one in settings.items():
                text = given.pop(name)
                if text is not None and one.is_list:
                    given[name] = tuple(part for each in text for part in one.parse(each))
                elif isinstance(text, bool):
                    given[name] = text
                elif text is not None:
                    given[name] = one.parse(text)
            return function(**given)

        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature([*map(_parameter, settings.values()), *own])  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(setting: Setting) -> inspect.Parameter:
    kind: Any
    if setting.kind == "flag":
        option, kind = typer.Option(setting.option, help=setting.help, show_default=False), bool
    else:
        option = typer.Option(setting.option, metavar=_metavar(setting), help=described(setting), show_default=False)
        kind = list[str] | None if setting.is_list else str | None
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if setting.kind == "flag" else None,
        annotation=Annotated[kind, option],
    )


def _metavar(setting: Setting) -> str:
    one = setting.metavar or {"integer": "N", "number": "X", "choice": "NAME", "text": "TEXT"}[setting.kind]
    return f"{one}[,{one}]" if setting.is_list and setting.separator == "," and not setting.metavar else one


def described(setting: Setting) -> str:
    """A setting's help with its range, unit and default."""
    facts = [f"{setting.range} {setting.unit}".strip()]
    facts += ["required"] if setting.is_required else [f"default: {shown}"] if (shown := setting.format(setting.default)) else []
    return f"{setting.help} [{'; '.join(fact for fact in facts if fact)}]".removesuffix(" []")


def print_row(row: Any, text: str, *, as_json: bool) -> None:
    """Print a result: as one line of JSON, or for people."""
    print(json.dumps(row, ensure_ascii=False) if as_json else text)


def configure_logging(level: str) -> None:
    """Send log messages of this level and above to stderr."""
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


def run(app: typer.Typer, arguments: Sequence[str] | None, name: str, program: str) -> int:
    """Run one command and return its exit status: 0 done; 2 wrong use or bad input, with one line on stderr; 130 interrupted.

    name, program   how the messages, and the usage lines, call what was started
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context(program, list(sys.argv[1:] if arguments is None else arguments)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as exc:
        return exc.exit_code
    except TyperException as exc:
        where = getattr(getattr(exc, "ctx", None), "command_path", program)
        print(f"{name}: {' '.join(exc.format_message().split()).rstrip('.')}: see {where} --help", file=sys.stderr)
        return 2
    except BiasDPOError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` closed stdout
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
