"""The Dockerfile, without Docker: what it copies is there and suffices, its command starts the app, its health check passes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.app_process import ROOT, free_port, wait_for_page


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the image that is kept: the last stage, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    found = [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def value_of(name: str) -> str:
    return next(arguments for instruction, arguments in reversed(instructions()) if instruction == name)


def copied() -> list[tuple[str, str]]:
    """(source, target) of each COPY from the build's context."""
    lines = [arguments.split() for name, arguments in instructions() if name == "COPY" and not arguments.startswith("--from")]
    return [(source, line[-1]) for line in lines for source in line[:-1]]


def test_it_runs_as_nobody_special_with_a_volume_and_a_port():
    steps = [name for name, _ in instructions()]
    assert value_of("USER") not in ("root", "0")
    assert steps.index("USER") < steps.index("CMD")
    assert value_of("VOLUME") == re.search(r"BIASDPO_WORKSPACE=(\S+)", value_of("ENV"))[1]
    command = json.loads(value_of("CMD"))
    assert command[command.index("--port") + 1] == value_of("EXPOSE")
    assert f":{value_of('EXPOSE')}/healthz" in value_of("HEALTHCHECK")


def test_the_context_holds_exactly_what_is_copied():
    listed = (ROOT / ".dockerignore").read_text().splitlines()
    whole = (ROOT / "Dockerfile").read_text()
    built = {word for line in re.findall(r"^COPY (?!--from)(.*)$", whole, flags=re.MULTILINE) for word in line.split()[:-1]}
    assert listed[0] == "*"
    assert {line[1:] for line in listed if line.startswith("!")} == built
    assert [name for name in built if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_what_is_copied_starts_and_is_healthy(tmp_path):
    image, data = tmp_path / "app", tmp_path / "data"
    data.mkdir()
    for source, target in copied():
        place = image / target / (source if target == "./" else "")
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, place)
    port = str(free_port())
    command = [
        sys.executable if word == "python" else word.replace(value_of("EXPOSE"), port) for word in json.loads(value_of("CMD"))
    ]
    environment = {**os.environ, "BIASDPO_WORKSPACE": str(data), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    log = tmp_path / "app.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=image, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for_page(f"http://127.0.0.1:{port}/", process, log, timeout_seconds=120)
        check = json.loads(value_of("HEALTHCHECK").partition("CMD ")[2].replace(value_of("EXPOSE"), port))
        assert subprocess.run([sys.executable, *check[1:]], timeout=60).returncode == 0
        assert (data / "workspace.json").exists() or any(data.iterdir())
    finally:
        process.terminate()
        process.wait(20)
    assert process.returncode == 0
