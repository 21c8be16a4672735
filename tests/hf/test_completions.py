"""Where a completion ends, what is shown of it, and what it is worth: the transformers backend's texts and likelihoods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import encode_completion, encode_prompt, encode_text
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.chat import PromptTemplate
from biasdpo.errors import PromptError
from biasdpo.records import LikelihoodRequest, TextRequest
from tests import tiny_models
from tests.hf.cases import GREEDY, PROMPTS, Case, read, text_of


def test_the_ends_are_those_of_model_tokenizer_llama_cpp_and_template(tiny_llama: Path, tiny_phi: Path) -> None:
    turn = PromptTemplate("{prompt}", "{completion}<|im_start|>{prompt}", special_tokens=("<|im_start|>",))
    for folder, template, names in (
        (tiny_llama, tiny_models.LLAMA_TEMPLATE, {"<|im_end|>", "<|endoftext|>"}),
        (tiny_llama, turn, {"<|im_end|>", "<|endoftext|>", "<|im_start|>"}),
        (tiny_phi, tiny_models.PHI_TEMPLATE, {"<|endoftext|>"}),
    ):
        backend = open_transformers(folder, template, None, 512)
        assert {backend._tokenizer.convert_ids_to_tokens(i) for i in backend._ends} == names
        backend.close()


def test_the_context_is_used_to_its_last_token(case: Case) -> None:
    short = open_transformers(case.folder, case.template, None, 128)
    tokenizer = case.backend._tokenizer
    room = 128 - len(encode_prompt(tokenizer, case.template, "1 1"))
    fits = "1 1" + " 1" * ((room - 1) // len(encode_text(tokenizer, " 1")))
    length = len(encode_prompt(tokenizer, case.template, fits))
    assert 124 <= length <= 127
    pieces, reason = read(short.stream(fits, GREEDY, "base"))
    assert (len(pieces), reason) == (128 - length + 1, "limit")  # the last token drawn need not be stored
    with pytest.raises(PromptError, match=r"is [\d,]+ tokens long with its template, the context holds 128"):
        read(short.stream("1 " * 128, GREEDY, "base"))
    short.close()


def test_stop_strings_and_prefix_reach_the_stream(case: Case) -> None:
    """A stretch of what the model writes is made the stop string, its first character the prefix."""
    free = open_transformers(case.folder, replace(case.template, completion_prefix="", stop=()), None, 512)
    text = text_of(free, PROMPTS[0], "base")
    template = replace(case.template, completion_prefix=text[0], stop=(text[10:14],))
    free.template = template
    pieces, reason = read(free.stream(PROMPTS[0], GREEDY, "base"))
    assert reason == "end_of_text"
    assert "".join(pieces) == text[1 : text.index(text[10:14], 1)]
    free.close()


def test_pieces_join_to_llama_cpps_text(tiny_llama: Path, tiny_llama_gguf: Path) -> None:
    """A random model writes broken UTF-8 in plenty: both backends show the same of it."""
    ours = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512)
    theirs = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, None, 512, kv_cache="f32")
    for prompt in PROMPTS:
        assert text_of(ours, prompt, "base") == text_of(theirs, prompt, "base")
    ours.close()
    theirs.close()


# Likelihood


def test_loglikelihood_is_a_sum_of_log_softmax(case: Case, bare: Any, peft: Any) -> None:
    tokenizer = case.backend._tokenizer
    requests = [
        LikelihoodRequest("Why?", "Because."),
        LikelihoodRequest("Why are nurses always women?", "They are not: " * 12, end_of_text=True),
        TextRequest("The quick brown fox\n12"),
        LikelihoodRequest("Hi", "x", system="Be kind" if case.template.has_system else ""),
    ] * 3
    for side, model in (("base", bare), ("tuned", peft)):
        results = case.backend.loglikelihood(requests, side)
        for request, result in zip(requests, results, strict=True):
            if isinstance(request, TextRequest):
                ids = encode_text(tokenizer, request.text)
                given = 1
            else:
                given_ids, scored = encode_completion(
                    tokenizer, case.template, request.prompt, request.continuation, request.system
                )
                given = len(given_ids)
                ids = given_ids + scored + [tokenizer.eos_token_id] * request.end_of_text
            with torch.inference_mode():
                logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            by_hand = sum(float(logps[i - 1, ids[i]]) for i in range(given, len(ids)))
            assert result.tokens == len(ids) - given
            assert result.logp == pytest.approx(by_hand, abs=2e-3)  # sums of up to 100 tokens in float32
