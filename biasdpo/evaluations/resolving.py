"""A request made definite: which model, which adapter, which device."""

from __future__ import annotations

from pathlib import Path

from biasdpo import models
from biasdpo.backends import choose_backend
from biasdpo.errors import ConfigError
from biasdpo.evaluations.request import RUN, WORKSPACE, EvaluationConfig
from biasdpo.workspace import Workspace


def resolved(request: EvaluationConfig, workspace: Workspace) -> tuple[EvaluationConfig, str]:
    """The request with a definite model and adapter, as a process finds them whose working folder is another; and the device,
    "cpu" or "gpu".

    Raises ConfigError, ModelError or AdapterError for what can't be evaluated. What is wrong with the data shows when they are
    read.
    """
    name = models.choose_auto()[0].id if request.model == "auto" else request.model
    spec = models.find(name)
    adapter = models.find_adapter(request.adapter, spec, workspace)
    adapter_name = "none"
    if adapter is not None:
        models.check_fits(adapter, spec)
        known = {one.id: one.folder for one in models.adapters(workspace)}
        adapter_name = adapter.id if known.get(adapter.id) == adapter.folder else str(adapter.folder.resolve())
    data_dir = Path(request.data_dir).expanduser().resolve() if request.data_dir else None
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"No folder {data_dir}: name with --data-dir the one that holds a folder a benchmark, or leave it out")
    is_file = request.dataset not in ("", RUN, WORKSPACE)
    definite = request.replace(
        model=models.absolute_name(name),
        adapter=adapter_name,
        data_dir="" if data_dir is None else str(data_dir),
        dataset=str(Path(request.dataset).expanduser().resolve()) if is_file else request.dataset,
    )
    on_gpu = choose_backend(spec, request.backend) != "llamacpp" and models.free_gpu_memory_gb() > 0
    return definite, "gpu" if on_gpu else "cpu"
