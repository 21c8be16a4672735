"""Opened models: loaded in the background, shared by all visitors, closed when the memory is needed."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from biasdpo import models
from biasdpo.access import is_owner, require_owner
from biasdpo.backends import NO_LLAMA_CPP, has_llama_cpp, open_backend
from biasdpo.backends.base import Backend, Cancellation
from biasdpo.errors import BackendError, BiasDPOError, ModelError
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.workspace import Workspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineKey:
    """A visitor's choice: names for `models.find` and `models.find_adapter` ("" is the model's default adapter)."""

    model: str
    adapter: str = ""
    backend: str = "auto"


@dataclass(frozen=True)
class Engine:
    """A model and an adapter (None: base-only) on a backend, proven and ready."""

    spec: ModelSpec
    adapter: AdapterSpec | None
    backend: Backend


@dataclass(eq=False)
class Loading:
    """Progress of loading an engine. Exactly one of `engine` and `error` is set once `done`."""

    share: float = 0.0
    what: str = "waiting to start"
    engine: Engine | None = None
    error: BaseException | None = None
    leases: int = field(default=0, repr=False)

    @property
    def done(self) -> bool:
        return self.engine is not None or self.error is not None

    @property
    def idle(self) -> bool:
        """Loaded, and nobody uses it."""
        return self.engine is not None and self.leases == 0


def open_engine(key: EngineKey, workspace: Workspace, loading: Loading | None = None) -> Engine:
    """Find, load and prove what `key` names. Close the engine's backend when done."""

    def report(share: float, what: str) -> None:
        if loading is not None:
            loading.share, loading.what = share, what

    spec = models.find(key.model)
    adapter = models.find_adapter(key.adapter, spec, workspace)
    if adapter is not None:
        models.check_fits(adapter, spec)
    backend = open_backend(spec, adapter, name=key.backend, workspace=workspace, on_progress=report)
    return Engine(spec, adapter, backend)


class EnginePool:
    """The engines of one app. Keeps at most `capacity`; closes the least recently used first.

    visitor_seconds   the longest that a visitor's pair may take
    """

    def __init__(self, workspace: Workspace, capacity: int = 2, visitor_seconds: float = math.inf) -> None:
        self.workspace = workspace
        self.visitor_seconds = visitor_seconds
        self._capacity = capacity
        self._changed = threading.Condition()
        self._engines: dict[EngineKey, Loading] = {}  # in order of last use

    def load(self, key: EngineKey) -> Loading:
        """Start loading `key` unless it is loaded or loading; return at once. A failed load is retried."""
        with self._changed:
            loading = self._engines.pop(key, None)
            if loading is None or loading.error is not None:
                loading = Loading()
                threading.Thread(target=self._open, args=(key, loading), name=f"load {key.model}", daemon=True).start()
            self._engines[key] = loading
            return loading

    def state(self, key: EngineKey) -> Loading | None:
        """Progress of `key`, or None if it was never requested. Starts nothing."""
        with self._changed:
            return self._engines.get(key)

    def opened(self) -> list[ModelSpec]:
        """The models that are loaded now."""
        with self._changed:
            return [loading.engine.spec for loading in self._engines.values() if loading.engine is not None]

    @contextmanager
    def lease(self, key: EngineKey, cancellation: Cancellation | None = None) -> Iterator[Engine]:
        """The engine of `key`, loaded if necessary and kept open until the block ends. A failed load raises its error."""
        with self._changed:
            loading = self.load(key)
            loading.leases += 1
        try:
            with self._changed:
                while not loading.done:
                    if cancellation is not None and cancellation.is_set():
                        raise BackendError("Cancelled while the model was loading: press Generate to continue")
                    self._changed.wait(0.2)
            if loading.error is not None:
                raise loading.error
            assert loading.engine is not None
            yield loading.engine
        finally:
            with self._changed:
                loading.leases -= 1
                self._changed.notify_all()

    def release_idle(self) -> list[str]:
        """Close every engine that nobody uses at this moment; return the models' titles. For any thread, at any time."""
        return self._release(lambda _engine: True)

    def release(self, device: Literal["cpu", "gpu"]) -> bool:
        """Close the engines on a device that nobody uses at this moment, so that a job has the memory; whether none is left."""

        def is_there(engine: Engine) -> bool:
            return engine.backend.device.startswith("CPU") == (device == "cpu")

        with self._changed:
            self._release(is_there)
            loading = [one for one in self._engines.values() if not one.done]  # these have a device soon
            return not loading and not any(one.engine is not None and is_there(one.engine) for one in self._engines.values())

    def close(self) -> None:
        """Close every engine that nobody uses, and forget failed and unfinished loads."""
        self.release_idle()
        with self._changed:
            self._engines = {key: loading for key, loading in self._engines.items() if loading.leases > 0}

    def _release(self, wanted: Callable[[Engine], bool]) -> list[str]:
        with self._changed:
            idle = [(key, loading.engine) for key, loading in self._engines.items() if loading.idle and loading.engine]
            return [self._close(key) for key, engine in idle if wanted(engine)]

    def _close(self, key: EngineKey) -> str:
        engine = self._engines.pop(key).engine
        assert engine is not None
        engine.backend.close()
        log.info("closed %s on %s", engine.spec.id, engine.backend.device)
        return engine.spec.title

    def _open(self, key: EngineKey, loading: Loading) -> None:
        try:
            self._make_room(key)
            engine = open_engine(key, self.workspace, loading)
        except BiasDPOError as exc:
            self._finish(loading, error=exc)
        except Exception as exc:
            error = BackendError(f"{key.model} could not be loaded ({type(exc).__name__}: {exc}): the terminal shows where")
            error.__cause__ = exc
            self._finish(loading, error=error)
            raise
        else:
            self._finish(loading, engine=engine)

    def _make_room(self, key: EngineKey) -> None:
        """Close idle engines until there is room for one more; wait if all are in use."""
        with self._changed:
            while True:
                loaded = [k for k, loading in self._engines.items() if k != key and loading.engine is not None]
                if len(loaded) < self._capacity:
                    return
                idle = [k for k in loaded if self._engines[k].idle]
                if idle:
                    self._close(idle[0])
                else:
                    self._changed.wait(0.2)

    def _finish(self, loading: Loading, engine: Engine | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            loading.engine, loading.error = engine, error
            self._changed.notify_all()


# The app's own model


class Startup:
    """The model that the app was started with; `resolve` settles "auto" in a background thread."""

    def __init__(self, model: str = "auto", backend: str = "auto") -> None:
        self.requested = model
        self.backend = backend
        self.reason = ""  # why "auto" chose this model, one sentence for the page
        self.error: BiasDPOError | None = None
        self._model = "" if model == "auto" else models.absolute_name(model)
        self._resolved = threading.Event()
        if self._model:
            self._resolved.set()

    @property
    def model(self) -> str:
        """The model's id; "" while it is not settled, or where `error` says why it never will be."""
        return self._model

    def resolve(self, pool: EnginePool) -> None:
        """Settle the model and start loading it with its default adapter."""
        if not self._resolved.is_set():
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
        if not has_llama_cpp():
            self.reason = f"{self.reason} {NO_LLAMA_CPP}".strip()
        if self._model:
            pool.load(EngineKey(self._model, default_adapter(self._model, pool.workspace), self.backend))

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the model is settled; False if it still is not."""
        return self._resolved.wait(timeout_seconds)

    def key(self, model: str, adapter: str, workspace: Workspace) -> EngineKey | None:
        """The engine that a visitor's choice means; None while "auto" is not settled.

        `model` may be "auto", `adapter` "" (the model's default). Visitors choose from the catalog and the
        known adapters only; the owner may start the app with any model.
        """
        if model not in ("auto", self.requested, self.model):
            check_model(model)
        check_adapter(adapter, workspace)
        if model == "auto" and self.error is not None:
            raise self.error
        name = self.model if model == "auto" else models.absolute_name(model)
        if not name:
            return None
        return EngineKey(name, adapter or default_adapter(name, workspace), self.backend)


def default_adapter(model: str, workspace: Workspace) -> str:
    """The adapter that a model opens with: the shipped one, else that of its newest run, else "none" (base only)."""
    try:
        spec = models.catalog()[model] if model in models.catalog() else models.find(model)
        if spec.default_adapter:
            return spec.default_adapter
        trained = models.adapters_made_for(spec, workspace)
    except BiasDPOError:
        return "none"  # loading the model gives the reason
    return trained[0].id if trained else "none"


def check_model(model: str) -> None:
    """Raise RefusedError for a visitor's model from outside the catalog."""
    if not is_owner() and model != "auto" and model not in models.catalog():
        require_owner(f"A model from outside the catalog ({', '.join(models.catalog())})")


def check_adapter(adapter: str, workspace: Workspace) -> None:
    """Raise RefusedError for a visitor's adapter that is no known one's id."""
    if not is_owner() and adapter not in {"", "none", *(known.id for known in models.adapters(workspace))}:
        require_owner("An adapter from a path")
