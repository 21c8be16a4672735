"""Jobs of each kind that are over in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from biasdpo.config import EvaluationConfig, ExportConfig
from biasdpo.workspace import Workspace
from tests import evaluating
from tests.run_line import kill_jobs


@pytest.fixture
def lora(tiny_llama_gguf: Path, tiny_llama_adapter: Path, workspace: Workspace) -> ExportConfig:
    """An adapter as a LoRA GGUF, the quickest export there is."""
    out = workspace.root / "exports" / "tiny.gguf"
    return ExportConfig(out=out, format="lora", adapter=str(tiny_llama_adapter), model=str(tiny_llama_gguf), pairs=0, threads=1)


@pytest.fixture
def evaluation(tiny_llama_gguf: Path, tmp_path: Path) -> EvaluationConfig:
    """A quick one, of the base model."""
    return evaluating.request(tiny_llama_gguf, "none", evaluating.write_items(tmp_path / "data", pairs=10))


@pytest.fixture(autouse=True)
def _no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kill what a test has left running in its `workspace`."""
    workspace = request.getfixturevalue("workspace") if "workspace" in request.fixturenames else None
    yield
    if workspace is not None:
        kill_jobs(workspace)
