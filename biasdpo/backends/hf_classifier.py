"""A text classifier of the Hub as a toxicity scorer, by transformers, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from biasdpo.benchmarks.toxicity import ToxicityScorer, name_of_classifier
from biasdpo.errors import BackendError, ConfigError

_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive")
_MAX_TOKENS = 512  # of a text; what the usual encoders take


def open_classifier(name: str) -> ToxicityScorer:
    """The scorer that OWNER/NAME, or OWNER/NAME#LABEL, names: a Hub id or a local folder. A text's score is the label's
    probability: by a sigmoid where the classifier knows several labels at once or a single one, else by a softmax.

    Without a LABEL, the one that says toxic, hate or offensive; a ConfigError lists the labels where none or several do.
    """
    hub_id, _, wanted = name.partition("#")
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as exc:
        raise BackendError(f"A classifier of the Hub needs {exc.name}: `pip install -r requirements.txt`") from exc
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(hub_id)
        model: Any = AutoModelForSequenceClassification.from_pretrained(hub_id)
    except Exception as exc:  # the Hub's, safetensors', the tokenizer's: all mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise BackendError(
            f"Can't load the classifier {hub_id}: {reason}; check its name and the network, or use the local profanity_check"
        ) from exc
    model.eval()
    labels = {int(i): str(label) for i, label in model.config.id2label.items()}
    column = _choose_label(labels, wanted, hub_id)
    one_by_one = model.config.problem_type == "multi_label_classification" or len(labels) == 1
    longest = min(_MAX_TOKENS, tokenizer.model_max_length)

    def score(texts: Sequence[str]) -> Sequence[float]:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        probabilities = logits.sigmoid() if one_by_one else logits.softmax(dim=-1)
        found: list[float] = probabilities[:, column].tolist()
        return found

    version = f"{getattr(model.config, '_commit_hash', None) or 'local'} ({labels[column]})"
    return ToxicityScorer(name_of_classifier(hub_id), version, score)


def _choose_label(labels: dict[int, str], wanted: str, hub_id: str) -> int:
    """The index of the label that was named, or that alone says toxic."""
    names = [wanted.casefold()] if wanted else list(_TOXIC_LABELS)
    found = [i for i, label in labels.items() if label.casefold() in names]
    if len(found) != 1:
        listed = ", ".join(labels.values())
        raise ConfigError(f"{hub_id} has the labels {listed}: name the toxic one, as in --toxicity-scorer hub:{hub_id}#LABEL")
    return found[0]
