"""How long until `python app.py` serves its first page, against a five-line Gradio hello-world.

    python -m tests.perf.startup

Start of the process to HTTP 200 of /, alternating, medians of 5. Prints one JSON object, seconds.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REPETITIONS = 5
HELLO = """
import gradio as gr
with gr.Blocks() as demo:
    name, out = gr.Textbox(), gr.Textbox()
    name.submit(lambda n: f"Hello {n}", name, out)
demo.launch(server_port=PORT, quiet=True)
"""


def seconds_to_first_page(*arguments: str) -> float:
    """`arguments`: of Python, with PORT in the place of a free port's number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *(argument.replace("PORT", port) for argument in arguments)]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - started < 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    if page.status == 200:
                        return time.perf_counter() - started
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise SystemExit(f"{command} served no page within 120 s")
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    seconds: dict[str, list[float]] = {"hello": [], "app": []}
    with tempfile.TemporaryDirectory() as workspace:
        for i in range(REPETITIONS + 1):
            hello = seconds_to_first_page("-c", HELLO)
            app = seconds_to_first_page("app.py", "--port", "PORT", "--workspace", workspace)
            if i > 0:  # the first round warms the disk's cache
                seconds["hello"].append(hello)
                seconds["app"].append(app)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    print(json.dumps({"repetitions": REPETITIONS, "seconds": medians, "ratio": round(medians["app"] / medians["hello"], 3)}))


if __name__ == "__main__":
    main()
