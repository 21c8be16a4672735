"""What a raw post to a public Space gets from the Train tab: its buttons are hidden there, but a post needs none."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from biasdpo.config import TrainConfig
from biasdpo.ui.train import MOST_SOURCES, from_config
from tests.app_process import running_app
from tests.run_folders import write_run

REFUSED = "switched off on a public Space"


class Poster:
    """Posts to functions by the element whose event runs them."""

    def __init__(self, url: str) -> None:
        self.url = url
        with urllib.request.urlopen(url + "config", timeout=30) as answer:
            self.config = json.load(answer)
        self.ids = {c["props"].get("elem_id"): c["id"] for c in self.config["components"]}

    def functions(self, element: str, event: str = "click") -> list[dict[str, Any]]:
        target = [self.ids[element], event]
        return [d for d in self.config["dependencies"] if target in d["targets"] and d["backend_fn"]]

    def post(self, function: dict[str, Any], data: list[Any]) -> str:
        """What a function answers: at once, or through the queue."""
        body = {"fn_index": function["id"], "data": data, "session_hash": "stranger"}
        if function["queue"] is False:
            return self._send("gradio_api/run/predict", body)
        joined = self._send("gradio_api/queue/join", body)
        assert "event_id" in joined, joined
        with urllib.request.urlopen(self.url + "gradio_api/queue/data?session_hash=stranger", timeout=60) as stream:
            lines = []
            for line in stream:
                lines.append(line.decode())
                if "process_completed" in lines[-1]:
                    break
        return "".join(lines)

    def _send(self, path: str, body: dict[str, Any]) -> str:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())


def test_every_action_is_refused_inside_its_function(tmp_path: Path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "p", "chosen": "the secret", "rejected": "r"}\n')
    write_run(tmp_path, "first")
    write_run(tmp_path, "halted", "stopped", steps=8)
    with running_app(tmp_path, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        poster = Poster(url)
        sources = [str(secret), 1, *["", 1] * (MOST_SOURCES - 1)]
        fields = from_config(TrainConfig())
        for element in ("train-start", "train-estimate"):
            *_, action = poster.functions(element)  # the last: the first only points out what is wrong with the fields
            assert REFUSED in poster.post(action, ["smollm2", "mine", None, *sources, *fields])
        assert not (tmp_path / "runs" / "mine").exists()
        (mixture,) = (f for f in poster.functions("train-source-1", "change") if f["queue"] is not False)
        answer = poster.post(mixture, [None, "0.1", 0, *sources])
        assert REFUSED in answer
        assert "rows read" not in answer
        (model,) = poster.functions("train-model", "input")
        assert REFUSED in poster.post(model, ["/etc/passwd.gguf", "", None])
        for element, data in (
            ("train-retry", ["halted"]),
            ("train-stop", ["halted", None]),
            ("train-resume", ["halted", None]),
            ("train-export-zip", ["first"]),
            ("train-save-note", ["first", "graffiti"]),
        ):
            (action,) = poster.functions(element)
            assert REFUSED in poster.post(action, data), element
        (ask,) = poster.functions("train-delete")
        poster.post(ask, ["first"])
        (really,) = poster.functions("train-really-delete")
        assert REFUSED in poster.post(really, [None])
    assert (tmp_path / "runs" / "first" / "adapter").is_dir()
    assert not (tmp_path / "runs" / "first" / "note.txt").exists()
