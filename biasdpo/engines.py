"""Opened models: loaded in the background, shared by all visitors, closed when the memory is needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from biasdpo import models
from biasdpo.backends import open_backend
from biasdpo.backends.base import Backend, Cancellation
from biasdpo.errors import BackendError, BiasDPOError
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
    """The engines of one app. Keeps at most `capacity`; closes the least recently used first."""

    def __init__(self, workspace: Workspace, capacity: int = 2) -> None:
        self.workspace = workspace
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
            loading = self._engines.get(key) or self.load(key)
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
