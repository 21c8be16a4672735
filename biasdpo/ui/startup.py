"""Which model the app opens with. "auto" may ask a GPU or download, so it is settled after the first page is served."""

from __future__ import annotations

import threading

from biasdpo import models
from biasdpo.engines import EngineKey, EnginePool
from biasdpo.errors import BiasDPOError, ModelError


class Startup:
    """The model named by --model; `resolve` settles it, from a background thread."""

    def __init__(self, model: str = "auto", backend: str = "auto") -> None:
        self.asked = model
        self.backend = backend
        self.reason = ""  # why "auto" chose what it chose: one sentence for the page
        self.error: BiasDPOError | None = None
        self._model = "" if model == "auto" else models.absolute_name(model)
        self._resolved = threading.Event()
        if self._model:
            self._resolved.set()

    @property
    def model(self) -> str:
        """The model's id, or "" while it is not settled (or could not be: see `error`)."""
        return self._model

    @property
    def resolved(self) -> bool:
        return self._resolved.is_set()

    def resolve(self, pool: EnginePool) -> None:
        """Settle the model and start loading it with its default adapter."""
        if not self.resolved:
            try:
                spec, self.reason = models.choose_auto()
                self._model = spec.id
            except BiasDPOError as exc:
                self.error = exc
            except Exception as exc:
                self.error = ModelError(f"No model could be chosen ({type(exc).__name__}: {exc}): name one with --model")
                raise
            finally:
                self._resolved.set()
        if self._model:
            pool.load(EngineKey(self._model, default_adapter(self._model, pool), self.backend))

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the model is settled; False if it still is not."""
        return self._resolved.wait(timeout_seconds)

    def model_of(self, picked: str) -> str:
        """The model that a visitor's choice means: "auto" is this app's; "" while that is not settled."""
        if picked != "auto":
            return picked
        if self.error is not None:
            raise self.error
        return self._model


def default_adapter(model: str, pool: EnginePool) -> str:
    """The adapter that a model opens with: the shipped one, else that of its newest run, else "none" (base-only)."""
    try:
        spec = models.catalog()[model] if model in models.catalog() else models.find(model)
        if spec.default_adapter:
            return spec.default_adapter
        trained = models.adapters_for(spec, pool.workspace)
    except BiasDPOError:
        return "none"  # the model's own line is shown when it is loaded
    return trained[0].id if trained else "none"
