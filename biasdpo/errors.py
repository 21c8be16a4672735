"""One tree of errors: a `BiasDPOError` is something the user can mend, one line, exit status 2. And how messages count."""


class BiasDPOError(Exception):
    """Something the user can mend. The message is one line: what, what was got, the remedy."""


class ConfigError(BiasDPOError):
    """A setting is out of its range, or two settings contradict each other."""


class ModelError(BiasDPOError):
    """A model is unknown, missing or damaged."""


class AdapterError(BiasDPOError):
    """An adapter is unknown, damaged, unsafe, or made for another base model."""


class PromptError(BiasDPOError):
    """A prompt is empty or longer than the model's context."""


class DatasetError(BiasDPOError):
    """Rows are no preference pairs, or there are too few of them."""


class BackendError(BiasDPOError):
    """An engine is missing, was stopped, or can't do what was asked of it."""


class ProofError(BackendError):
    """The comparison could not be proven honest, so none is shown."""


class JobError(BiasDPOError):
    """A job is unknown, damaged, or in a state that does not allow what was asked."""


class RunError(BiasDPOError):
    """A training run can't be started or can't go on."""


class ExportError(BiasDPOError):
    """A GGUF could not be written, or was not proven equal to its model."""


class PublishError(BiasDPOError):
    """A run can't be published, or the Hub did not take it."""


class EvaluationError(BiasDPOError):
    """An evaluation is unknown, in a state that does not allow what was asked, or its result is damaged."""


class WorkspaceError(BiasDPOError):
    """A folder can't be written, or a lock can't be had."""


class RefusedError(BiasDPOError):
    """The action is not for whoever asks: a visitor."""


# Counts in messages


def plural(count: int, noun: str, nouns: str = "") -> str:
    """ "1 pair", "2 pairs", "1,024 pairs"."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
