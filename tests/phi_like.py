"""A tokenizer laid out like Phi-2's, trained here: byte-level BPE, then its added tokens, then rows without a token."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = 51_200  # of Phi-2's embedding, of which its tokenizer knows 50,295


def save_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files, trained on README and the sources; return the id of <|endoftext|>.

    GPT-2's pre-tokenizer; after the BPE's tokens <|endoftext|>, 31 to 2 spaces, 9 to 2 tabs, each run a token. Phi-2's files name
    CodeGenTokenizer as its class.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    sources = [ROOT / "README.md", *sorted((ROOT / "biasdpo").glob("*.py")), ROOT / "assets" / "proof_texts.jsonl"]
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in sources], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(run, special=False, normalized=True) for run in runs])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "CodeGenTokenizer"}))
    return int(tokenizer.token_to_id("<|endoftext|>"))
