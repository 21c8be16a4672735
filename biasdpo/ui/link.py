"""Settings as a query string, and back: a link that reopens the page with prompt and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from biasdpo import models
from biasdpo.errors import BiasDPOError, ConfigError, PromptError
from biasdpo.records import Sampling, check_strength
from biasdpo.workspace import Workspace, is_public_space, refuse_on_public_space

# Servers and proxies on the way cut or refuse longer addresses (RFC 9110, 4.1, asks for 8,000 octets).
MAX_LINK_CHARACTERS = 8000


@dataclass(frozen=True)
class Settings:
    """All that one visitor has set. `model` may be "auto"; `adapter` "" is the model's default, "none" base-only."""

    prompt: str = ""
    model: str = "auto"
    adapter: str = ""
    system: str = ""
    strength: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    random_seed: bool = False


def check_model(model: str) -> str:
    """A model's name as a visitor may use it here: on a public Space, of the catalog only."""
    if is_public_space() and model != "auto" and model not in models.catalog():
        refuse_on_public_space(f"A model from outside the catalog ({', '.join(models.catalog())})")
    return model


def check_adapter(adapter: str, workspace: Workspace) -> str:
    """An adapter's name as a visitor may use it here: on a public Space the id of a known one, never a path."""
    if is_public_space() and adapter not in {"", "none", *(known.id for known in models.adapters(workspace))}:
        refuse_on_public_space("An adapter from a path")
    return adapter


def encode(settings: Settings) -> str:
    """The query string ("?prompt=...") of these settings; ConfigError where it gets too long for an address."""
    sampling = settings.sampling
    values: dict[str, str] = {
        "prompt": settings.prompt,
        "model": settings.model,
        "adapter": settings.adapter,
        "strength": f"{settings.strength:g}",
        "temperature": f"{sampling.temperature:g}",
        "top_p": f"{sampling.top_p:g}",
        "top_k": str(sampling.top_k),
        "repetition_penalty": f"{sampling.repetition_penalty:g}",
        "max_new_tokens": str(sampling.max_new_tokens),
        "seed": str(sampling.seed),
        "random": "1" if settings.random_seed else "",
        "system": settings.system,
    }
    query = "?" + urlencode({name: value for name, value in values.items() if value})
    if len(query) > MAX_LINK_CHARACTERS:
        raise ConfigError(
            f"This prompt is too long for a link: it would have {len(query):,} characters of at most {MAX_LINK_CHARACTERS:,}; "
            "copy the prompt itself"
        )
    return query


def decode(query: Mapping[str, str], defaults: Settings, workspace: Workspace) -> tuple[Settings, list[str]]:
    """The settings that a query names, and one line for each value that was bad and stayed at its default."""
    settings = defaults
    problems: list[str] = []

    def take(name: str, change: Callable[[Settings, str], Settings]) -> None:
        nonlocal settings
        if name in query:
            try:
                settings = change(settings, query[name])
            except BiasDPOError as exc:
                problems.append(str(exc))
            except ValueError:
                problems.append(f"{name} must be a number: got {query[name][:40]!r}; the default is used")

    def take_sampling(name: str, parse: Callable[[str], Any]) -> None:
        take(name, lambda s, text: replace(s, sampling=replace(s.sampling, **{name: parse(text)})))

    take("prompt", lambda s, text: replace(s, prompt=_check_prompt(text)))
    take("model", lambda s, text: replace(s, model=check_model(text)))
    take("adapter", lambda s, text: replace(s, adapter=check_adapter(text, workspace)))
    take("system", lambda s, text: replace(s, system=text))
    take("strength", lambda s, text: replace(s, strength=check_strength(float(text))))
    for name in ("temperature", "top_p", "repetition_penalty"):
        take_sampling(name, float)
    for name in ("top_k", "max_new_tokens", "seed"):
        take_sampling(name, int)
    take("random", lambda s, text: replace(s, random_seed=text == "1"))
    return settings, problems


def _check_prompt(text: str) -> str:
    if len(text) > MAX_LINK_CHARACTERS:
        raise PromptError(f"The link's prompt has {len(text):,} characters of at most {MAX_LINK_CHARACTERS:,}: paste it instead")
    return text
