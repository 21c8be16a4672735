"""Evaluations of a workspace, in processes of their own, and what is made of their results.

`start` evaluates in a process that neither a closed page nor the end of the app stops. WORKSPACE/evaluations/ holds of each
ID.request.json, ID.status.json, ID.log, and at its end ID.json: the result, as `python -m biasdpo evaluate --out` writes it.
What is made of a result: `table`, `compare`, `flips`, `curve`, `report`, a module each.
"""

from __future__ import annotations

from biasdpo.evaluations.estimate import estimate_seconds, known_seconds
from biasdpo.evaluations.jobs import Evaluation, cancel, delete, find, list_evaluations, resume, start
from biasdpo.evaluations.request import EvaluationConfig
from biasdpo.evaluations.status import Progress, State

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "Progress",
    "State",
    "cancel",
    "delete",
    "estimate_seconds",
    "find",
    "known_seconds",
    "list_evaluations",
    "resume",
    "start",
]
