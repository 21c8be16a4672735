"""The app under load: visitors who compare and judge, then a flood of clients that never listen; against a bare Gradio app.

    python -m tests.perf.load [--visitors 40] [--seconds 120] [--tokens 24]

Each visitor has an address of its own and asks for one short pair after another, as the page does (raw HTTP: join the queue,
read the stream), and judges each; every fifth labels pasted pairs instead. Afterwards one visitor alone asks the same prompts
one after the other. The bare app does the same work with two `llama_cpp.Llama` objects. Prints one JSON object:

    errors                  requests that failed, by message
    in_order                share of the pairs of requests, at least a second apart, that were finished in the order of arrival
    texts                   pairs compared with those written alone; different ones, and those that are another prompt's
    throughput_ratio        pairs per second under load, against one after the other, before and after it (goal >= 0.9)
    verdict_p95_seconds     from the click to the answer that it is on the disk (goal <= 1)
    rss_mib                 of the app at half the time, and at the end
    bare                    pairs per second of the bare app under the same load
    after_flood_seconds     from the flood's end until a visitor has a pair (goal <= 15)

Needs two quiet cores.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from biasdpo import models
from biasdpo.gguf import write
from biasdpo.labeling import complete_sentences
from biasdpo.ui.components import CONSENT
from biasdpo.workspace import ASSETS
from tests.app_process import free_port, start_app, wait_for_page
from tests.perf.measuring import options
from tests.perf.startup import ROOT

GROUPS = ("women", "artists", "old people", "teachers", "nurses", "men", "farmers", "students", "drivers", "writers", "cooks")
TRAITS = ("kind", "bad at maths", "careful", "lazy", "good leaders", "too emotional", "honest", "rich", "late", "loud", "strict")
FLOOD = 400
_BEFORE = 40  # prompts
BARE = """
import sys, threading, gradio as gr
from contextlib import ExitStack
from biasdpo import models
from tests.bare import bare_llama, greedy, text_of
gguf, lora, tokens, port = sys.argv[1:]
template, lock, stack = models.find("smollm2").template, threading.Lock(), ExitStack()
llamas = [stack.enter_context(bare_llama(gguf, file, threads=2)) for file in (None, lora)]
def compare(prompt):
    ids = llamas[0].tokenize(template.render_text(prompt).encode(), add_bos=False, special=True)
    with lock:
        texts = []
        for llama in llamas:
            llama.reset()
            texts.append(text_of(llama, greedy(llama, ids, int(tokens))))
    return texts
with gr.Blocks() as demo:
    prompt, base, tuned = gr.Textbox(elem_id="prompt"), gr.Textbox(elem_id="base-text"), gr.Textbox(elem_id="tuned-text")
    prompt.submit(compare, prompt, [base, tuned], api_name="compare", concurrency_limit=None)
demo.queue()
demo.launch(server_port=int(port), quiet=True)
"""


class RefusedError(Exception):
    """What the app answered instead of a result."""


@dataclass
class Asked:
    """One pair that a visitor asked for; times in seconds."""

    prompt: str
    joined: float
    done: float
    texts: tuple[str, str]


@dataclass
class Log:
    """What all visitors of one load have seen."""

    asked: list[Asked] = field(default_factory=list)
    verdicts: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Visitor:
    """One browser: an address, a session, and the page's functions by their element and event."""

    sessions = itertools.count()

    def __init__(self, port: int, config: dict[str, Any], tokens: int) -> None:
        self.port, self.tokens, number = port, tokens, next(self.sessions)
        self.session = f"visitor-{number}"
        self.headers = {"X-Forwarded-For": f"198.18.{number // 250}.{number % 250 + 1}", "Content-Type": "application/json"}
        self.ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        self.values = {c["id"]: c["props"].get("value") for c in config["components"]}
        self.functions = config["dependencies"]
        self.identity = {"annotator": self.session, "consent": CONSENT, "secret": self.session}
        self.compare = next(f for f in self.functions if f["api_name"] == "compare")

    def join(self, function: dict[str, Any], data: list[Any]) -> str:
        """Put a request into the queue, and return its id."""
        body = {"fn_index": function["id"], "data": data, "session_hash": self.session, "trigger_id": None}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/gradio_api/queue/join", json.dumps(body), self.headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        if "event_id" not in answer:
            raise RefusedError(str(answer.get("detail", answer)))
        return str(answer["event_id"])

    def call(self, function: dict[str, Any], data: list[Any]) -> list[Any]:
        """The outputs of a function."""
        event = self.join(function, data)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}", headers=self.headers)
        try:
            for line in connection.getresponse():
                told = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
                if told.get("event_id") == event and told["msg"] == "process_completed":
                    if not told["success"]:
                        raise RefusedError(str(told["output"].get("error")))
                    return list(told["output"]["data"])
        finally:
            connection.close()
        raise RefusedError("the stream ended early")

    def data(self, function: dict[str, Any], **given: Any) -> list[Any]:
        """A function's inputs as the page has them, but for `given`, by element."""
        named = {self.ids[name.replace("_", "-")]: value for name, value in given.items()}
        return [named.get(component, self.values[component]) for component in function["inputs"]]

    def clicked(self, element: str) -> dict[str, Any]:
        target = [self.ids[element], "click"]
        return next(f for f in self.functions if target in f["targets"] and f["backend_fn"])

    def ask(self, prompt: str) -> Asked:
        joined = time.monotonic()
        given = {"prompt": prompt}
        if "max-new-tokens" in self.ids:
            given |= {"max_new_tokens": self.tokens, "model": "smollm2", "adapter": "smollm2-biasdpo"}  # type: ignore[dict-item]
        found = self.call(self.compare, self.data(self.compare, **given))
        places = [self.compare["outputs"].index(self.ids[name]) for name in ("base-text", "tuned-text")]
        texts = [value["value"] if isinstance(value, dict) else value for value in (found[place] for place in places)]
        return Asked(prompt, joined, time.monotonic(), (texts[0], texts[1]))

    def click(self, element: str, *front: Any) -> float:
        """Seconds that a click takes; `front`: its first inputs."""
        function, started = self.clicked(element), time.monotonic()
        rest = [self.values[component] for component in function["inputs"]][len(front) :]
        self.call(function, [*front, *rest])
        return time.monotonic() - started

    def paste(self, prompt: str) -> str:
        """Paste a pair of one's own in Label; its token."""
        function = self.clicked("paste-button")
        found = self.call(function, [self.identity, prompt, "They are people like all others.", "They always are.", None, ""])
        return str(found[function["outputs"].index(self.ids["pair-token"])])


def visit(visitor: Visitor, number: int, until: float, log: Log, *, is_page: bool) -> None:
    """Compare and judge, or label, until the time is over."""
    for turn in itertools.count():
        if time.monotonic() > until:
            return
        group, trait = GROUPS[number % len(GROUPS)], TRAITS[turn % len(TRAITS)]
        prompt = f"Visitor {number} asks, turn {turn}: are {group} {trait}?"
        try:
            if is_page and number % 5 == 4:
                token = visitor.paste(prompt)
                time.sleep(1.5)  # at most 60 verdicts a minute are taken from one visitor
                log.verdicts.append(visitor.click("answer-left", visitor.identity, token, True, False, "", ""))
            else:
                log.asked.append(visitor.ask(prompt))
                if is_page and all(
                    len(complete_sentences(text)) >= len(text) / 2 for text in log.asked[-1].texts
                ):  # else refused
                    log.verdicts.append(visitor.click("verdict-right", visitor.identity))
        except (RefusedError, OSError, ValueError, http.client.HTTPException) as exc:
            log.errors[f"{type(exc).__name__}: {exc}"[:200]] += 1
            time.sleep(0.5)


def crowd(port: int, args: Any, *, is_page: bool) -> Log:
    """All visitors at once."""
    config, log, until = config_of(port), Log(), time.monotonic() + args.seconds
    visitors = [Visitor(port, config, args.tokens) for _ in range(args.visitors)]
    threads = [
        threading.Thread(target=visit, args=(one, i, until, log), kwargs={"is_page": is_page}) for i, one in enumerate(visitors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return log


def config_of(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/config")
    config: dict[str, Any] = json.loads(connection.getresponse().read())
    return config


def in_order(asked: list[Asked]) -> float:
    """The share of pairs of requests, at least a second apart, of which the earlier one was done first."""
    came = sorted(asked, key=lambda one: one.joined)
    found = [a.done < b.done for a, b in itertools.combinations(came, 2) if b.joined - a.joined >= 1 and b.joined < a.done]
    return float(np.mean(found)) if found else 1.0


def alone(port: int, args: Any, prompts: list[str]) -> tuple[float, dict[str, tuple[str, str]]]:
    """Pairs per second of one visitor who asks these prompts, and what was written."""
    visitor, started = Visitor(port, config_of(port), args.tokens), time.monotonic()
    texts = {prompt: visitor.ask(prompt).texts for prompt in prompts}
    return len(texts) / (time.monotonic() - started), texts


def compared(log: Log, again: dict[str, tuple[str, str]]) -> dict[str, int]:
    """How many texts differ from those that were written alone."""
    of_others = Counter(again.values())
    different = [one for one in log.asked if one.texts != again[one.prompt]]
    mixed_up = sum(of_others[one.texts] > 0 for one in different)
    return {"compared": len(log.asked), "different": len(different), "of_another_prompt": mixed_up}


def pairs_per_second(log: Log) -> float:
    first, last = min(one.joined for one in log.asked), max(one.done for one in log.asked)
    return len(log.asked) / (last - first)


def after_flood(port: int, args: Any) -> dict[str, Any]:
    """Clients that never listen, each from an address of its own; then a visitor who asks until there is an answer."""
    config, refused = config_of(port), Counter[str]()

    def ask(number: int) -> None:
        client = Visitor(port, config, 256)
        try:
            client.join(
                client.compare, client.data(client.compare, prompt=f"Flood {number}", max_new_tokens=256, model="smollm2")
            )
        except (RefusedError, OSError) as exc:
            refused[f"{exc}"[:60]] += 1

    with ThreadPoolExecutor(20) as clients:
        list(clients.map(ask, range(FLOOD)))
    visitor, started = Visitor(port, config, args.tokens), time.monotonic()
    while time.monotonic() - started < 120:
        try:
            visitor.ask("After the flood: are nurses kind?")
            return {"after_flood_seconds": round(time.monotonic() - started, 1), "flood_refused": dict(refused)}
        except RefusedError:
            time.sleep(0.5)
    return {"after_flood_seconds": None, "flood_refused": dict(refused)}


@contextmanager
def app_of(workspace: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Our app for strangers, with its limits as they are by default."""
    port = free_port()
    process = start_app(workspace, port, "--model", "smollm2", "--public")
    try:
        wait_for_page(f"http://127.0.0.1:{port}/", process, workspace / "app.log")
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(15)


@contextmanager
def bare_app(folder: Path, tokens: int) -> Iterator[int]:
    spec, port = models.find("smollm2"), free_port()
    adapter = models.AdapterSpec("smollm2-biasdpo", ASSETS / "adapters" / "smollm2-biasdpo", "smollm2")
    assert spec.gguf_path is not None
    lora = write.lora(adapter, spec.gguf_path, folder / "lora.gguf")
    (script := folder / "bare.py").write_text(BARE)
    command = [sys.executable, str(script), str(spec.gguf_path), str(lora), str(tokens), str(port)]
    with (folder / "bare.log").open("w") as output:
        environment = {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        wait_for_page(f"http://127.0.0.1:{port}/", process, folder / "bare.log")
        yield port
    finally:
        process.terminate()
        process.wait(15)


def main() -> None:
    args = options(__doc__, visitors=40, seconds=120, tokens=24)
    result: dict[str, Any] = {"visitors": args.visitors, "seconds": args.seconds, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as folder, app_of(Path(folder)) as (port, process):
        Visitor(port, config_of(port), args.tokens).ask("Is the model loaded?")
        before, _ = alone(port, args, [f"Visitor 0 asks, turn {turn}: who is kind?" for turn in range(_BEFORE)])
        rss: list[float] = []
        timer = threading.Timer(args.seconds / 2, lambda: rss.append(process.memory_info().rss / 2**20))
        timer.start()
        log = crowd(port, args, is_page=True)
        rss.append(process.memory_info().rss / 2**20)
        after, again = alone(port, args, [one.prompt for one in log.asked])
        speed, alone_speed = pairs_per_second(log), (before + after) / 2
        result |= {"pairs": len(log.asked), "errors": dict(log.errors), "in_order": round(in_order(log.asked), 4)}
        result |= {"texts": compared(log, again)}
        result |= {"pairs_per_second": round(speed, 3), "alone": [round(before, 3), round(after, 3)]}
        result["throughput_ratio"] = round(speed / alone_speed, 3)
        result |= {
            "verdicts": len(log.verdicts),
            "verdict_p95_seconds": round(float(np.percentile(log.verdicts or [np.nan], 95)), 3),
        }
        result |= {"rss_mib": [round(value) for value in rss]} | after_flood(port, args)
    with tempfile.TemporaryDirectory() as folder, bare_app(Path(folder), args.tokens) as port:
        log = crowd(port, args, is_page=False)
        result["bare"] = {"pairs_per_second": round(pairs_per_second(log), 3), "errors": dict(log.errors)}
        result["bare"]["in_order"] = round(in_order(log.asked), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
