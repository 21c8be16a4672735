"""TRL's DPO trainer, fed with rows that are tokenised already (the prompt template and its special tokens are ours)."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer


class TokenisedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl has no types
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`; the rest of TRL 1.16 is left as it is."""

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """No card in each checkpoint: the run's own provenance says more."""
