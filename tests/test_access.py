"""Accounts, and what each role may do: in functions, and by raw requests to a running app."""

from __future__ import annotations

import http.client
import io
import json
import stat
import urllib.parse
from pathlib import Path

import gradio as gr
import pytest
from gradio.context import LocalContext
from starlette.requests import Request

from biasdpo import access, accounts
from biasdpo.access import Caller, Role
from biasdpo.accounts import Accounts
from biasdpo.config import ServeConfig
from biasdpo.errors import ConfigError
from biasdpo.ui.jobs import run_estimate
from biasdpo.ui.limits import client_address
from biasdpo.ui.security import Callers
from tests import commands
from tests.app_process import running_app
from tests.run_folders import write_run

PASSWORD = "correct horse"


@pytest.fixture
def users(tmp_path: Path) -> Accounts:
    one = Accounts(tmp_path / "users.toml")
    one.add("kim", PASSWORD, "owner")
    one.add("lee", PASSWORD + "!", "annotator")
    return one


def test_a_name_that_nobody_can_have_is_not_remembered_whole(tmp_path):
    accounts = Accounts(tmp_path / "users.toml")
    assert not accounts.sign_in("n" * 1_000_000, "wrong password", "198.51.100.1")
    assert len(repr(accounts)) < 1_000


def test_accounts(users):
    assert (users.role("kim"), users.role("lee"), users.role("nobody")) == (Role.owner, Role.annotator, Role.visitor)
    assert users.sign_in("kim", PASSWORD)
    assert not users.sign_in("lee", PASSWORD)
    assert not users.sign_in("nobody", "")
    users.add("kim", "another password", "annotator")
    assert not users.sign_in("kim", PASSWORD)
    assert users.sign_in("kim", "another password")
    users.remove("kim")
    assert (list(users.read()), users.role("kim")) == (["lee"], Role.visitor)
    text = users.file.read_text()
    assert PASSWORD not in text
    assert stat.S_IMODE(users.file.stat().st_mode) == 0o600


def test_wrong_passwords_make_a_name_wait_at_their_address_only(users, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    for _ in range(5):
        assert not users.sign_in("kim", "wrong password", "203.0.113.5")
    assert not users.sign_in("kim", PASSWORD, "203.0.113.5")
    assert users.sign_in("kim", PASSWORD, "198.51.100.7")
    assert users.sign_in("lee", PASSWORD + "!", "203.0.113.5")
    now[0] += 2
    assert users.sign_in("kim", PASSWORD, "203.0.113.5")
    assert not users.sign_in("kim", "wrong password", "203.0.113.5")
    assert users.sign_in("kim", PASSWORD, "203.0.113.5")  # a success forgets the failures before it


def test_guesses_from_many_addresses_are_answered_late_and_lock_nobody_out(users, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    assert users.sign_in("lee", PASSWORD + "!", "198.51.100.7")
    delays = []
    for i in range(40):
        delays.append(users.delay("lee", f"203.0.113.{i}"))
        assert not users.sign_in("lee", "wrong password", f"203.0.113.{i}")
    assert delays == sorted(delays)
    assert (delays[10], delays[39]) == (0, 8)
    assert users.delay("lee", "198.51.100.7") == users.delay("kim", "203.0.113.1") == 0
    assert users.delay("lee", "198.51.100.8") == 8
    assert users.sign_in("lee", PASSWORD + "!", "198.51.100.8")  # late, and in
    now[0] += 601
    assert users.delay("lee", "198.51.100.9") == 0


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda users: users.add("a b", PASSWORD, "owner"), "'a b'"),
        (lambda users: users.add("mo", "short", "owner"), "10 to 1024 characters: got 5"),
        (lambda users: users.remove("mo"), "No account 'mo'.*kim, lee"),
        (lambda users: users.file.write_text("[kim]\nrole = 3\n") and users.read(), "'kim'.*damaged"),
        (lambda users: users.file.write_text("[kim") and users.read(), "Can't read the accounts"),
    ],
)
def test_what_is_wrong_with_accounts_is_one_line(users, act, words):
    with pytest.raises(ConfigError, match=words):
        act(users)


def test_the_command(tmp_path, monkeypatch):
    file = tmp_path / "team.toml"
    monkeypatch.setattr("sys.stdin", io.StringIO(PASSWORD + "\n"))
    assert commands.run("users", "add", "kim", "--role", "owner", "--file", file).returncode == 0
    assert json.loads(commands.run("users", "list", "--file", file, "--json").stdout) == {"name": "kim", "role": "owner"}
    assert Accounts(file).sign_in("kim", PASSWORD)
    assert commands.run("users", "remove", "kim", "--file", file).returncode == 0
    assert "No account 'kim'" in commands.run("users", "remove", "kim", "--file", file).error


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "lab.example"])
def test_an_address_that_others_reach_needs_accounts_or_public(host, monkeypatch):
    with pytest.raises(ConfigError, match=r"--host .* add --auth FILE .* or --public"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, public=True).public
    assert ServeConfig(host=host, auth="users.toml").auth
    with pytest.raises(ConfigError, match="leave one of them out"):
        ServeConfig(auth="users.toml", public=True)
    monkeypatch.setenv("SPACE_ID", "someone/biasdpo")
    assert ServeConfig().address == "0.0.0.0"


@pytest.mark.parametrize("host", ["", "127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_alone_needs_neither(host):
    assert not ServeConfig(host=host).public


def test_the_audit_log_says_who(tmp_path, monkeypatch):
    access.audit(tmp_path, "start", job="train/a")
    monkeypatch.setattr(access, "_source", lambda: Caller(Role.annotator, "lee"))
    access.audit(tmp_path, "delete", job="train/a")
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(row["by"], row["action"], row["job"]) for row in rows] == [
        ("owner", "start", "train/a"),
        ("lee", "delete", "train/a"),
    ]


class Browser:
    """Raw requests with one cookie jar."""

    def __init__(self, url: str, **headers: str) -> None:
        self.host = urllib.parse.urlsplit(url).netloc
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.cookie = ""

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        connection.request(method, path, body, {"Content-Type": kind, "Cookie": self.cookie, **self.headers})
        answer = connection.getresponse()
        if cookies := [value for name, value in answer.getheaders() if name.lower() == "set-cookie"]:
            self.cookie = "; ".join(one.partition(";")[0] for one in cookies)
        text = answer.read().decode()
        connection.close()
        return answer.status, text

    def sign_in(self, name: str, password: str) -> int:
        body = urllib.parse.urlencode({"username": name, "password": password}).encode()
        return self.send("POST", "/login", body, "application/x-www-form-urlencoded")[0]

    def write_note(self, config: dict, text: str) -> str:
        note = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "train-note")
        function = next(f for f in config["dependencies"] if [note, "blur"] in f["targets"] and f["backend_fn"])
        body = json.dumps({"fn_index": function["id"], "data": ["first", text], "session_hash": "s"}).encode()
        self.send("POST", "/gradio_api/queue/join", body)
        return self.send("GET", "/gradio_api/queue/data?session_hash=s")[1]


def test_an_app_with_accounts(users, tmp_path):
    write_run(tmp_path, "first")
    note = tmp_path / "runs" / "first" / "note.txt"
    with running_app(tmp_path, "--model", "smollm2", "--auth", str(users.file)) as url:
        stranger, lee, kim = Browser(url), Browser(url), Browser(url)
        for path in ("/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=s"):
            assert stranger.send("GET", path)[0] == 401, path
        assert stranger.send("POST", "/gradio_api/queue/join", b"{}")[0] == 401
        assert stranger.sign_in("kim", "wrong password") == 400
        assert lee.sign_in("lee", PASSWORD + "!") == kim.sign_in("kim", PASSWORD) == 200
        config = json.loads(lee.send("GET", "/config")[1])
        assert "only for this app" in lee.write_note(config, "graffiti")
        assert not note.exists()
        kim.write_note(config, "mine")
        assert note.read_text().strip() == "mine"
        users.remove("kim")
        assert "only for this app" in kim.write_note(config, "no more")
        # What a stranger writes into X-Forwarded-For stands left of what the trusted proxy adds: their own address.
        for i in range(5):
            assert Browser(url, X_Forwarded_For=f"198.51.100.{i}, 203.0.113.5").sign_in("lee", "wrong password") == 400
        assert Browser(url, X_Forwarded_For="198.51.100.7, 203.0.113.5").sign_in("lee", PASSWORD + "!") == 400
        assert Browser(url, X_Forwarded_For="198.51.100.7").sign_in("lee", PASSWORD + "!") == 200
    log = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(row["action"], row["by"]) for row in log] == [
        ("sign in refused", "kim"),
        ("sign in", "lee"),
        ("sign in", "kim"),
        *[("sign in refused", "lee")] * 6,
        ("sign in", "lee"),
    ]


def test_an_estimates_thread_has_the_callers_role(monkeypatch):
    monkeypatch.setattr(access, "_source", Callers(public=True))
    token = LocalContext.request.set(gr.Request(Request({"type": "http"})))
    try:
        seen = []
        list(run_estimate(lambda _seconds: None, lambda cancelled: seen.append((access.caller().role, cancelled()))))
    finally:
        LocalContext.request.reset(token)
    assert seen == [(Role.visitor, False)]


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({}, "10.0.0.9"),
        ({"x-forwarded-for": "8.8.8.8"}, "8.8.8.8"),
        ({"x-forwarded-for": "1.1.1.1, 8.8.8.8, 10.1.2.3"}, "8.8.8.8"),
        ({"x-forwarded-for": "junk"}, "10.0.0.9"),
    ],
)
def test_a_spaces_visitor_is_the_last_public_address(headers, address, monkeypatch):
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "headers": raw, "client": ("10.0.0.9", 1)})
    assert client_address(request) == "10.0.0.9"
    monkeypatch.setenv("SPACE_ID", "ada/biasdpo")
    assert client_address(request) == address


@pytest.mark.parametrize("proxy", ["*", "proxy.example", "10.0.0.0/99"])
def test_a_proxy_is_trusted_by_its_address(proxy):
    with pytest.raises(ConfigError, match="--trusted-proxy is an IP address or a network: got"):
        ServeConfig(trusted_proxies=(proxy,))


def test_accounts_without_an_owner_are_refused(tmp_path):
    Accounts(tmp_path / "users.toml").add("lee", PASSWORD, "annotator")
    with pytest.raises(AssertionError, match="has no owner"), running_app(tmp_path, "--auth", str(tmp_path / "users.toml")):
        pass


@pytest.mark.parametrize(
    ("session", "caller"),
    [
        ({}, Caller(Role.visitor)),
        ({"oauth_info": {"userinfo": {"preferred_username": "ada"}}}, Caller(Role.owner, "ada")),
        ({"oauth_info": {"userinfo": {"preferred_username": "eve"}}}, Caller(Role.visitor, "eve")),
        (
            {"oauth_info": {"userinfo": {"preferred_username": "eve", "orgs": [{"preferred_username": "ada"}]}}},
            Caller(Role.owner, "eve"),
        ),
    ],
)
def test_a_spaces_owner_and_its_members_by_their_session(session, caller, monkeypatch):
    """The session as Gradio's Hub sign-in stores it; no Space was tried."""
    monkeypatch.setenv("SPACE_ID", "ada/biasdpo")
    monkeypatch.setenv("SPACE_AUTHOR_NAME", "ada")
    token = LocalContext.request.set(gr.Request(Request({"type": "http", "session": session})))
    try:
        assert Callers()() == caller
    finally:
        LocalContext.request.reset(token)
