"""The command `users`: accounts of an app that is started with --auth."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from biasdpo.accounts import Accounts
from biasdpo.cli_options import JsonOption, WorkspaceOption, new_app, print_row
from biasdpo.errors import ConfigError
from biasdpo.migrations import open_workspace

FileOption = Annotated[str, Option("--file", metavar="FILE", help="accounts file [default: users.toml in the workspace]")]
NameArgument = Annotated[str, Argument(metavar="NAME")]
RoleOption = Annotated[
    Literal["annotator", "owner"], Option("--role", help="annotator: compares and judges; owner: trains, deletes, everything")
]

users = new_app("Accounts for `python app.py --auth FILE`.")


@users.command()
def add(name: NameArgument, role: RoleOption = "annotator", file: FileOption = "", workspace: WorkspaceOption = "") -> None:
    """Add an account, or change its password and role. Asks for the password, or reads a line from stdin."""
    accounts = _accounts(file, workspace)
    accounts.add(name, _password(), role)
    print(f"{name} ({role}) can sign in to an app started with --auth {accounts.file}")


@users.command()
def remove(name: NameArgument, file: FileOption = "", workspace: WorkspaceOption = "") -> None:
    """Remove an account. Whoever is signed in with it loses its rights at once."""
    accounts = _accounts(file, workspace)
    accounts.remove(name)
    print(f"{name} was removed from {accounts.file}")


@users.command("list")
def list_accounts(file: FileOption = "", workspace: WorkspaceOption = "", as_json: JsonOption = False) -> None:
    """List the accounts."""
    for name, user in _accounts(file, workspace).read().items():
        print_row({"name": name, "role": user["role"]}, f"{name:<20} {user['role']}", as_json=as_json)


def _accounts(file: str, workspace: str) -> Accounts:
    return Accounts(Path(file) if file else open_workspace(workspace).root / "users.toml")


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise ConfigError("The two passwords differ: type the same twice")
    return password
