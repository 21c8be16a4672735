"""A model as transformers and TRL want it: its Hugging Face folder, its tokenizer, and token ids as the template wants them."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from biasdpo.errors import ModelError, WorkspaceError
from biasdpo.models import ModelSpec
from biasdpo.template import PromptTemplate
from biasdpo.workspace import Workspace, locked, sha256_of

_LOCK_SECONDS = 1800.0  # another process may be writing Phi-2's 11 GB


def hf_copy(spec: ModelSpec, workspace: Workspace) -> Path:
    """The model's Hugging Face folder: its own, or one written from its GGUF into WORKSPACE/cache/hf, once.

    Raises ModelError where the GGUF is damaged or holds what can't be carried over.
    """
    if spec.hf_folder is not None:
        return spec.hf_folder
    from biasdpo.backends.gguf_to_hf import write_hf_folder

    gguf_path = spec.require_files().gguf_path
    assert gguf_path is not None
    if not gguf_path.is_file():
        raise ModelError(f"No model file {gguf_path}: check the path, or fetch the file again")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf_path.stem)
    folder = workspace.cache / "hf" / f"{name}-{sha256_of(gguf_path)[:12]}"
    with locked(folder, _LOCK_SECONDS):
        if not folder.is_dir():
            for abandoned in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                write_hf_folder(gguf_path, temporary)
                temporary.chmod(0o755)
                temporary.rename(folder)
            except OSError as exc:
                raise WorkspaceError(f"Can't write the copy of {gguf_path.name} to {folder}: {exc}; make room there") from exc
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{folder} has no tokenizer that transformers can load ({exc}): fetch the model again") from exc
    if not tokenizer.is_fast:
        raise ModelError(f"{folder} has no tokenizer.json: fetch the model again, with that file")
    return tokenizer


# Token ids


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: what looks like a special token stays text; no begin-of-text token."""
    # Half a surrogate pair, which no UTF-8 can hold, becomes "?".
    clean = text.encode("utf-8", "replace").decode("utf-8")
    ids: list[int] = tokenizer.encode(clean, add_special_tokens=False, split_special_tokens=True)
    return ids


def encode_prompt(tokenizer: Any, template: PromptTemplate, prompt: str, system: str = "") -> list[int]:
    """Token ids of a rendered prompt. Special tokens come from the template's own segments, never from a user's text."""
    ids = begin_ids(tokenizer)
    for segment in template.render(prompt, system):
        if segment.special:
            token = tokenizer.convert_tokens_to_ids(segment.text)
            if token is None or tokenizer.convert_ids_to_tokens(token) != segment.text:
                raise ModelError(
                    f"The prompt template has the special token {segment.text!r}, which the model's tokenizer lacks: correct "
                    "the template in assets/models.toml"
                )
            ids.append(token)
        else:
            ids += encode_text(tokenizer, segment.text)
    return ids


def encode_completion(tokenizer: Any, template: PromptTemplate, text: str, end_of_text: bool) -> list[int]:
    """Token ids of a completion that follows a rendered prompt, with the end-of-text token if asked for."""
    ids = encode_text(tokenizer, template.completed(text))
    return [*ids, int(tokenizer.eos_token_id)] if end_of_text else ids


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of (what is given, what is scored) of a bare text (see `records.ContinuationRequest`)."""
    begin = begin_ids(tokenizer)
    if not context and not begin:
        begin = [int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)]
    given = begin + encode_text(tokenizer, context)
    tokens = begin + encode_text(tokenizer, context + continuation)
    return tokens[: len(given)], tokens[len(given) :]


def begin_ids(tokenizer: Any) -> list[int]:
    """What the model's text begins with: its begin-of-text token, or nothing."""
    ids: list[int] = tokenizer.encode("")
    return [i for i in ids if i == tokenizer.bos_token_id]
