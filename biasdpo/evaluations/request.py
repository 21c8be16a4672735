"""An evaluation's config with what its process needs of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from biasdpo import benchmarks as known
from biasdpo import config
from biasdpo.config import RUN, WORKSPACE
from biasdpo.errors import ConfigError

__all__ = ["RUN", "WORKSPACE", "EvaluationConfig"]


class EvaluationConfig(config.EvaluationConfig):
    """`config.EvaluationConfig` as a command and as JSON."""

    def command(self, out: Path | None = None, workspace: Path | None = None) -> list[str]:
        """`python -m biasdpo evaluate` of this config, by this Python. `out` None: result.json."""
        folder = [] if workspace is None else [f"--workspace={workspace}"]
        return [sys.executable, "-m", "biasdpo", "evaluate", *self.to_arguments(), *folder, f"--out={out or 'result.json'}"]

    def parts(self) -> list[str]:
        """The benchmarks by the names that a result has them under: `utility` stands for two, `perplexity` for its quick half."""
        return ["utility" if name == "perplexity" else name for name in known.expand(self.benchmarks)]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The config that `to_json` gave. Raises ConfigError for anything else."""
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), str):
            raise ConfigError(f"Not an evaluation's request: {values!r:.80}; start the evaluation anew")
        return cls(**{name: value for name, value in values.items() if name in cls.model_fields})
