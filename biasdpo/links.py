"""The settings of a comparison, and how a link names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from biasdpo.engines import check_adapter, check_model
from biasdpo.errors import BiasDPOError, ConfigError, PromptError
from biasdpo.records import Sampling, check_strength
from biasdpo.workspace import Workspace

GREEDY = Sampling(max_new_tokens=256, temperature=0.0, repetition_penalty=1.0)
"""The page's default: what the models say without chance and without a penalty that hides the contrast."""
MAX_LINK_CHARACTERS = 8_000  # what browsers and proxies take

_FLOATS = ("temperature", "top_p", "repetition_penalty")
_INTEGERS = ("max_new_tokens", "top_k", "seed")


@dataclass(frozen=True)
class PairSettings:
    """All that a visitor sets. `model` may be "auto"; `adapter` "" is the model's default, "none" base-only."""

    prompt: str = ""
    model: str = "auto"
    adapter: str = ""
    system: str = ""
    strength: float = 1.0
    sampling: Sampling = GREEDY

    @classmethod
    def checked(cls, prompt: Any, model: Any, adapter: Any, system: Any, strength: Any, *sampling: Any) -> PairSettings:
        """Validate what was posted: anyone can post anything to a page. `sampling`: the fields of `Sampling`, in order."""
        texts = {"prompt": prompt, "model": model, "adapter": adapter, "system": system}
        for name, value in texts.items():
            if not isinstance(value, str | None):
                raise ConfigError(f"{name} must be text: got {type(value).__name__}; send a string")
        named = {name: value or "" for name, value in texts.items()} | {"model": model or "auto"}
        return cls(**named, strength=check_strength(strength), sampling=Sampling(*sampling))

    def values(self) -> list[Any]:
        """The fields in the order of `checked`."""
        sampling = [getattr(self.sampling, field.name) for field in fields(Sampling)]
        return [self.prompt, self.model, self.adapter, self.system, self.strength, *sampling]

    def to_query(self) -> str:
        """The query string ("?prompt=...") that names these settings; ConfigError if it is too long for an address."""
        values: dict[str, Any] = {"prompt": self.prompt, "model": self.model, "adapter": self.adapter, "system": self.system}
        values |= {"strength": f"{self.strength:g}"}
        values |= {name: f"{getattr(self.sampling, name):g}" for name in _FLOATS}
        values |= {name: str(getattr(self.sampling, name)) for name in _INTEGERS}
        query = "?" + urlencode({name: value for name, value in values.items() if value})
        if len(query) > MAX_LINK_CHARACTERS:
            raise ConfigError(
                f"This prompt is too long for a link: {len(query):,} characters of at most {MAX_LINK_CHARACTERS:,}; copy the "
                "prompt itself"
            )
        return query


def from_query(query: Mapping[str, str], workspace: Workspace) -> tuple[PairSettings, list[str]]:
    """The settings that a link names, and one line for each value that is refused and stays at its default."""
    settings = PairSettings()
    problems: list[str] = []

    def take(name: str, change: Callable[[PairSettings, str], PairSettings]) -> None:
        nonlocal settings
        if name not in query:
            return
        try:
            settings = change(settings, query[name])
        except BiasDPOError as exc:
            problems.append(str(exc))
        except ValueError:
            problems.append(f"{name} must be a number: got {query[name][:40]!r}; the default is used")

    def take_model(settings: PairSettings, model: str) -> PairSettings:
        check_model(model)
        return replace(settings, model=model or "auto")

    def take_adapter(settings: PairSettings, adapter: str) -> PairSettings:
        check_adapter(adapter, workspace)
        return replace(settings, adapter=adapter)

    take("prompt", lambda s, text: replace(s, prompt=_check_length(text)))
    take("system", lambda s, text: replace(s, system=_check_length(text)))
    take("model", take_model)
    take("adapter", take_adapter)
    take("strength", lambda s, text: replace(s, strength=check_strength(float(text))))
    for names, parse in ((_FLOATS, float), (_INTEGERS, int)):
        for name in names:
            take(name, lambda s, text, n=name, p=parse: replace(s, sampling=replace(s.sampling, **{n: p(text)})))  # type: ignore[misc]
    return settings, problems


def _check_length(text: str) -> str:
    if len(text) > MAX_LINK_CHARACTERS:
        raise PromptError(f"The link has a text of {len(text):,} characters, at most {MAX_LINK_CHARACTERS:,}: paste it instead")
    return text
