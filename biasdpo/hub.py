"""The Hugging Face Hub: the token, what its client raises in one line, and the files of a repository or bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasdpo.errors import BiasDPOError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKENS = "https://huggingface.co/settings/tokens"
_REASONS = {
    401: "the Hub does not accept the token: run `hf auth login`, or set HF_TOKEN anew",
    402: "the account has too little credit: add some at https://huggingface.co/settings/billing",
    403: f"the token may not do this: make one that may write there at {TOKENS}",
    404: "the Hub has no such repository, or the token may not see it: check the name and the token",
    409: "somebody else wrote there meanwhile: look at it first",
    412: "somebody else wrote there meanwhile: look at it first",
    429: "the Hub's rate limit is reached: wait, then try again",
}


def client() -> HfApi:
    """The Hub's client, with the token of HF_TOKEN or `hf auth login`, if there is one."""
    from huggingface_hub import HfApi

    return HfApi(library_name="biasdpo")


def require_token(what: str) -> str:
    """Return the token; ConfigError if there is none. `what` begins the message: "Publishing"."""
    from huggingface_hub import get_token

    if token := get_token():
        return token
    raise ConfigError(
        f"{what} needs a Hub token that may write there, and there is none: run `hf auth login`, or set HF_TOKEN (on a Space: a "
        "secret of that name under Settings)"
    )


def reason_of(exc: BaseException) -> str:
    """Why the Hub did not do something, in one line, without addresses that were signed for one upload."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(exc, BiasDPOError):
        return str(exc)
    if isinstance(exc, OfflineModeIsEnabled):
        return "the Hub can't be reached, since HF_HUB_OFFLINE is set: unset it"
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if status is not None:
        said = " ".join((getattr(exc, "server_message", None) or "").split())[:200]
        other = f"the Hub refused it with status {status}" if status < 500 else f"the Hub failed with status {status}: try later"
        reason = _REASONS.get(status, other)
        return f"{reason} ({said})" if said else reason
    line = " ".join(str(exc).split())[:200].rstrip(".")
    if isinstance(exc, ValueError):  # of a card's front matter, for example
        return f"the Hub's client refuses it: {line}"
    if exc.__cause__ is not None:
        return reason_of(exc.__cause__)
    return f"the Hub can't be reached ({type(exc).__name__}{': ' * bool(line)}{line})"


@contextmanager
def explained(what: str, error: type[BiasDPOError], then: str = "") -> Iterator[None]:
    """Turn what the Hub's client raises into an `error` of one line: `what` failed, why, and what to do `then`."""
    try:
        yield
    except BiasDPOError:
        raise
    except Exception as exc:  # huggingface_hub raises many unrelated classes
        raise error(f"{what}: {reason_of(exc)}{then}") from exc


@dataclass(frozen=True)
class HubFiles:
    """The files of a `target`, bucket:OWNER/NAME or dataset:OWNER/NAME. Raises what huggingface_hub raises."""

    target: str

    @property
    def id(self) -> str:
        return self.target.partition(":")[2]

    @property
    def is_bucket(self) -> bool:
        return self.target.startswith("bucket:")

    def create(self) -> bool:
        """Create it, private, unless it exists; return whether it is private."""
        if self.is_bucket:
            client().create_bucket(self.id, private=True, exist_ok=True)
            return bool(client().bucket_info(self.id).private)
        return create_private(self.id, "dataset")

    def sizes(self) -> dict[str, int]:
        """All files: bytes by path."""
        if self.is_bucket:
            entries: Any = client().list_bucket_tree(self.id, recursive=True)
        else:
            entries = client().list_repo_tree(self.id, repo_type="dataset", recursive=True)
        return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Download files of one folder, each whole or not at all."""
        names = sorted(names)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            if names and self.is_bucket:
                client().download_bucket_files(self.id, [(name, Path(scratch, name)) for name in names])
            elif names:
                patterns = names if len(names) < 100 else [f"{Path(names[0]).parent}/*"]  # each is matched with each file
                client().snapshot_download(self.id, repo_type="dataset", allow_patterns=patterns, local_dir=scratch)
            for name in names:
                Path(scratch, name).replace(folder / name)

    def change(self, add: Mapping[str, bytes], delete: Iterable[str], title: str) -> None:
        """Add and delete files, all at once."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self.is_bucket:
            client().batch_bucket_files(self.id, add=[(data, name) for name, data in add.items()], delete=list(delete))
            return
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in add.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in delete),
        ]
        client().create_commit(self.id, operations, commit_message=title, repo_type="dataset")

    def forget_history(self) -> None:
        """Leave nothing but the files as they are; a bucket has no history."""
        if not self.is_bucket:
            client().super_squash_history(self.id, repo_type="dataset")


def create_private(name: str, kind: str) -> bool:
    """Create a repository (`kind`: model or dataset), private, unless it exists; return whether it is private."""
    client().create_repo(name, repo_type=kind, private=True, exist_ok=True)
    return bool(client().repo_info(name, repo_type=kind).private)
