"""Accounts of an app that asks for a password: a TOML file, passwords hashed with Argon2."""

from __future__ import annotations

import threading
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import Argon2Error, InvalidHashError

from biasdpo.access import Role
from biasdpo.errors import ConfigError
from biasdpo.workspace import locked, replacing

MIN_PASSWORD, _MAX_PASSWORD = 10, 1024
_MAX_NAME = 64
_FREE_FAILURES = 5  # wrong passwords for one name from one address before that address has to wait
_MAX_WAIT_SECONDS = 300.0
_FREE_GUESSES = 10  # wrong passwords for one name from everywhere before an address where it never signed in is answered late
_GUESS_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.5, 8.0
_FORGET_SECONDS = 600.0
_MAX_KEPT = 10_000
_hasher = PasswordHasher()


@dataclass
class Accounts:
    """The accounts in a file: [NAME] with `role` ("annotator" or "owner") and `password` (its hash)."""

    file: Path
    # By name and address: how many, and when the next may be tried.
    _failures: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    _guesses: dict[str, tuple[int, float]] = field(default_factory=dict)  # by name: how many from everywhere, and the last
    _known: dict[tuple[str, str], None] = field(default_factory=dict)  # names, and addresses where they have signed in
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> dict[str, dict[str, str]]:
        """The accounts by name; none if there is no file. ConfigError where one is damaged."""
        try:
            users = tomllib.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as exc:
            raise ConfigError(f"Can't read the accounts in {self.file}: {exc}; restore the file or make it again") from exc
        for name, user in users.items():
            if not isinstance(user, dict) or user.get("role") not in ("annotator", "owner") or not _is_hash(user.get("password")):
                raise ConfigError(f"The account {name!r} in {self.file} is damaged: give it its password again with `users add`")
        return users

    def add(self, name: str, password: str, role: str) -> None:
        """Add an account, or give one a new password and role. ConfigError for a name or password that it can't have."""
        if not name.isidentifier() or not name.isascii() or len(name) > _MAX_NAME:
            raise ConfigError(f"An account's name is 1 to {_MAX_NAME} letters, digits or '_', no digit first: got {name!r}")
        if not MIN_PASSWORD <= len(password) <= _MAX_PASSWORD:
            raise ConfigError(f"A password has {MIN_PASSWORD} to {_MAX_PASSWORD} characters: got {len(password)}; choose another")
        with locked(self.file):
            self._write(self.read() | {name: {"role": role, "password": _hasher.hash(password)}})

    def remove(self, name: str) -> None:
        """Remove an account; who is signed in with it has no rights any more."""
        with locked(self.file):
            users = self.read()
            if users.pop(name, None) is None:
                raise ConfigError(f"No account {name!r} in {self.file}: there are {', '.join(users) or 'none'}")
            self._write(users)

    def role(self, name: str) -> Role:
        """A signed-in user's role; a visitor's if the account was removed."""
        user = self.read().get(name)
        return Role.visitor if user is None else Role[user["role"]]

    def delay(self, name: str, address: str) -> float:
        """Seconds to wait before a password is tried, after many wrong ones from everywhere. Nobody can lock a name out with it:
        the wait is short, is not longer for being repeated, and is not asked where the name has signed in before."""
        with self._lock:
            count, last = self._guesses.get(name, (0, 0.0))
            if (name, address) in self._known or time.monotonic() - last > _FORGET_SECONDS:
                return 0.0
            return min(max(count - _FREE_GUESSES, 0) * _GUESS_DELAY_SECONDS, _MAX_DELAY_SECONDS)

    def sign_in(self, name: str, password: str, address: str = "") -> bool:
        """Whether the password is this account's. Takes as long for an unknown name; wrong ones make the name wait at that
        address."""
        name = name[: _MAX_NAME + 1]  # a longer one is nobody's, but would be remembered
        now, who = time.monotonic(), (name, address)
        with self._lock:
            count, free_at = self._failures.get(who, (0, 0.0))
            if now < free_at:
                return False
        user = self.read().get(name)
        try:
            right = _hasher.verify(user["password"] if user else _NO_PASSWORD, password[:_MAX_PASSWORD]) and user is not None
        except Argon2Error:
            right = False
        with self._lock:
            self._failures.pop(who, None)
            if right:
                self._known[who] = None
            else:
                wait = 0.0 if count + 1 < _FREE_FAILURES else min(2.0 ** (count + 1 - _FREE_FAILURES), _MAX_WAIT_SECONDS)
                self._failures[who] = (count + 1, now + wait)
                guesses, last = self._guesses.pop(name, (0, 0.0))
                self._guesses[name] = (1 if now - last > _FORGET_SECONDS else guesses + 1, now)
            tables: list[dict[Any, Any]] = [self._failures, self._guesses, self._known]
            for kept in tables:
                if len(kept) > _MAX_KEPT:
                    kept.pop(next(iter(kept)))
        return right

    def _write(self, users: dict[str, dict[str, str]]) -> None:
        lines = (f'[{name}]\nrole = "{user["role"]}"\npassword = "{user["password"]}"\n' for name, user in users.items())
        with replacing(self.file, mode=0o600) as temporary:
            temporary.write_text("\n".join(lines), encoding="utf-8")


_NO_PASSWORD = _hasher.hash("")


def _is_hash(text: Any) -> bool:
    try:
        return isinstance(text, str) and extract_parameters(text) is not None
    except InvalidHashError:
        return False
