"""What the measurements share: their options, and figures from a process of their own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """The options of a measurement. A default gives its type; a type alone means no default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        option = "--" + name.replace("_", "-")
        if default is False:
            parser.add_argument(option, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(option, type=default)
        else:
            parser.add_argument(option, type=type(default), default=default)
    return parser.parse_args()


def in_own_process(module: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """The JSON object that `python -m MODULE ARGUMENTS` prints last."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


def rounded(values: dict[str, float], digits: int = 3) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}
