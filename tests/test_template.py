"""Phi-2's prompt template: the same tokens in training, generation and evaluation on both backends; where a completion ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from biasdpo.backends import hf
from biasdpo.backends.base import Backend, ShownText
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.hf_loading import encode_completion, encode_prompt, encode_text, load_tokenizer
from biasdpo.backends.llamacpp import LlamaCppBackend, open_llamacpp
from biasdpo.chat import PromptTemplate, Segment
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import PromptError
from biasdpo.records import LikelihoodRequest, Sampling
from tests import tiny_models
from tests.hf.cases import read
from training.callbacks import ProbeCallback
from training.rows import tokenize

PHI = tiny_models.PHI_TEMPLATE  # "Instruct: {prompt}\nOutput:", completion prefix " ", stop "\nInstruct:"
PROMPT = "Why are nurses always women?"
COMPLETIONS = [
    "They are not.",
    " One space",
    "    return 1\n    return 2",
    "\tA tab",
    "\nA line",
    "An end \n",
    "日本語 😀",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def llamacpp(tiny_phi_gguf: Path) -> Iterator[LlamaCppBackend]:
    backend = open_llamacpp(tiny_phi_gguf, PHI, None, 512, threads=1, kv_cache="f32")
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def transformers(tiny_phi: Path) -> Iterator[Backend]:
    backend = open_transformers(tiny_phi, PHI, None, 512, device="cpu")
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_phi: Path) -> Any:
    return load_tokenizer(tiny_phi)


@pytest.fixture(scope="module")
def bare(tiny_phi: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_phi)


def training_tokens(tokenizer: Any, completion: str) -> tuple[list[int], list[int]]:
    """(prompt, completion with its end) as training computes with them."""
    [row] = tokenize([PreferencePair(PROMPT, completion, "x")], tokenizer, PHI, 512).rows
    return row.prompt_ids, row.chosen_ids


# Tokens


def test_an_end_of_text_that_is_left_out_is_no_part_of_a_completion(tokenizer: Any) -> None:
    pair = PreferencePair(PROMPT, "They are not.", "They are.")
    [trained], [left_out] = (tokenize([pair], tokenizer, PHI, 512, ends).rows for ends in ("trained", "left_out"))
    assert trained.chosen_ids == [*left_out.chosen_ids, tokenizer.eos_token_id]
    assert trained.rejected_ids == [*left_out.rejected_ids, tokenizer.eos_token_id]
    assert trained.prompt_ids == left_out.prompt_ids


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_training_and_evaluation_have_the_same_tokens(
    completion: str, tokenizer: Any, bare: Any, llamacpp: LlamaCppBackend, transformers: Backend
) -> None:
    import torch

    prompt, scored = training_tokens(tokenizer, completion)
    assert llamacpp.tokenize(PHI.render(PROMPT)) == prompt
    assert [*llamacpp.tokenize((Segment(PHI.completed(completion), special=False),), begin=False), 0] == scored  # 0 ends a text
    with torch.inference_mode():
        logps = bare(torch.tensor([prompt + scored])).logits[0].double().log_softmax(-1)
    by_hand = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(scored))
    for backend in (llamacpp, transformers):
        [found] = backend.loglikelihood([LikelihoodRequest(PROMPT, completion, end_of_text=True)], "base")
        assert found.tokens == len(scored)
        assert found.logp == pytest.approx(by_hand, abs=0.02)  # ggml's GELU goes through F16
        scores = backend.score_tokens(LikelihoodRequest(PROMPT, completion, end_of_text=True), "base")
        assert "".join(text for text, _ in scores).startswith(PHI.completed(completion))
        assert sum(logp for _, logp in scores) == pytest.approx(by_hand, abs=0.02)


@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
@pytest.mark.parametrize("completion", ["They are not.", "A line\n    return 1", "日本語 😀", "An end \n"])
def test_a_model_that_writes_the_training_tokens_shows_the_completion(
    completion: str, engine: str, tokenizer: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = request.getfixturevalue(engine)
    _prompt, written = training_tokens(tokenizer, completion)
    let_it_write(written, monkeypatch)
    pieces, reason = read(backend.stream(PROMPT, Sampling(max_new_tokens=200, temperature=0.0), "base"))
    assert ("".join(pieces), reason, len(pieces)) == (completion, "end_of_text", len(written))


def let_it_write(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Both backends draw these tokens, whatever the model says. What they have not drawn yet is in the list."""
    script = list(tokens)
    monkeypatch.setattr(LlamaCppBackend, "_next_token", lambda *_: script.pop(0))
    monkeypatch.setattr(hf.Sampler, "__call__", lambda *_: script.pop(0))
    return script


def test_exactly_one_space_stands_before_a_completion_and_belongs_to_it(tokenizer: Any) -> None:
    _, one = encode_completion(tokenizer, PHI, PROMPT, "They are not.")
    assert tokenizer.decode(one) == " They are not."
    for typed in (" They are not.", "  They are not.", "     They are not."):
        assert encode_completion(tokenizer, PHI, PROMPT, typed)[1] == one
    # Which is why it belongs there: prompt and completion apart have the tokens of the whole text.
    whole = f"Instruct: {PROMPT}\nOutput: They are not."
    assert encode_prompt(tokenizer, PHI, PROMPT) + one == encode_text(tokenizer, whole)


def test_an_empty_completion_is_the_end_alone(tokenizer: Any, llamacpp: LlamaCppBackend, transformers: Backend) -> None:
    for typed in ("", " ", "   "):
        assert encode_completion(tokenizer, PHI, PROMPT, typed)[1] == []
        for backend in (llamacpp, transformers):
            [found] = backend.loglikelihood([LikelihoodRequest(PROMPT, typed, end_of_text=True)], "base")
            assert found.tokens == 1
            with pytest.raises(PromptError, match="Nothing to score"):
                backend.loglikelihood([LikelihoodRequest(PROMPT, typed)], "base")


def test_without_a_prefix_a_completion_is_left_as_it_is() -> None:
    chat = tiny_models.LLAMA_TEMPLATE
    assert [chat.completed(text) for text in (" Yes", "Yes", "")] == [" Yes", "Yes", ""]


# Where a completion ends

ENDS = [
    (" Paris.\nInstruct: And Rome?\nOutput: Rome.", "Paris.", True),
    (" Paris.\n\nInstruct: And Rome?", "Paris.", True),
    (" Paris. \n \t\n\nInstruct:", "Paris.", True),
    ("Instruct: And Rome?", "", True),  # an empty output, and on with the next one
    (" Instruct: And Rome?", "", True),
    ("\nInstruct: And Rome?", "", True),
    (" \n\nInstruct: And Rome?", "", True),
    (" One.\n\nTwo.\nInstruct:", "One.\n\nTwo.", True),
    # No stop string, or half of one.
    (" Write Instruct: before it.", "Write Instruct: before it.", False),
    (" Paris.\nInstructions follow.", "Paris.\nInstructions follow.", False),
    (" Paris.\nInstruct", "Paris.\nInstruct", False),
    (" Paris.\n\n", "Paris.\n\n", False),
    (" Instruct", "Instruct", False),
    (" For example:\nInput: 3\nOutput: 9", "For example:\nInput: 3\nOutput: 9", False),
    ("   Paris.", "Paris.", False),
    ("Paris.", "Paris.", False),
    ("\nParis.", "\nParis.", False),
    ("  ", "", False),
    ("", "", False),
]


@pytest.mark.parametrize(("written", "shown", "stops"), ENDS)
def test_what_is_shown_is_the_same_however_it_is_cut_into_pieces(written: str, shown: str, stops: bool) -> None:
    inner = range(1, len(written))
    cuts = [(), *combinations(inner, 1), *combinations(inner, 2), tuple(inner)]
    for cut in cuts:
        edges = [0, *cut, len(written)]
        text, out, stopped = ShownText(PHI), "", False
        for begin, end in pairwise(edges):
            piece, stopped = text.add(written[begin:end], final=False)
            out += piece
            assert shown.startswith(out)  # nothing that is shown is taken back
            if stopped:
                break
        else:
            piece, stopped = text.add("", final=True)
            out += piece
        assert (out, stopped) == (shown, stops)


def test_text_is_held_back_no_longer_than_it_is_uncertain() -> None:
    text = ShownText(PHI)
    assert [text.add(piece, final=False)[0] for piece in (" ", "Yes", ".", " \n", "Inst", "ead", "\n")] == [
        "", "Yes", ".", "", "", " \nInstead", ""
    ]  # fmt: skip
    assert text.add("", final=True) == ("\n", False)
    chat = ShownText(tiny_models.LLAMA_TEMPLATE)  # no stop string: white space is shown at once
    assert [chat.add(piece, final=False)[0] for piece in (" ", "\n", "Yes")] == [" ", "\n", "Yes"]


@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
def test_no_backend_writes_on_after_the_next_instruct(
    engine: str, tokenizer: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = request.getfixturevalue(engine)
    script = let_it_write(encode_text(tokenizer, " They are not.\n\nInstruct: Write on\nOutput: and on"), monkeypatch)
    pieces, reason = read(backend.stream(PROMPT, Sampling(max_new_tokens=200, temperature=0.0), "base"))
    assert ("".join(pieces), reason) == ("They are not.", "end_of_text")
    assert tokenizer.decode(script) == " Write on\nOutput: and on"


def test_the_live_probe_ends_where_the_compare_tab_does(tokenizer: Any) -> None:
    import torch

    asked: dict[str, Any] = {}

    def generate(input_ids: Any, **settings: Any) -> Any:
        asked.update(settings)
        written = encode_text(tokenizer, " They are not.\n\nInstruct: Write on\nOutput: and on")
        return torch.cat([input_ids, torch.tensor([written])], dim=1)

    config = SimpleNamespace(eos_token_id=0)
    model = SimpleNamespace(generate=generate, generation_config=config, config=config)
    trainer = SimpleNamespace(model=model, is_fsdp_enabled=False, accelerator=SimpleNamespace(device=torch.device("cpu")))
    writer: Any = SimpleNamespace(check_stop_alone=lambda: None)
    assert ProbeCallback(trainer, writer, tokenizer, PHI, [], 1).complete(PROMPT) == "They are not."
    assert asked["eos_token_id"] == [0]


def test_a_character_is_shown_when_it_is_whole() -> None:
    data = "é😀!".encode()

    def decode(ids: list[int]) -> str:
        return bytes(data[i] for i in ids).decode("utf-8", "replace")

    text = hf.CompletionText(decode, PromptTemplate("{prompt}"))
    assert [text.add(i, final=False)[0] for i in range(7)] == ["", "é", "", "", "", "😀", "!"]
    text = hf.CompletionText(decode, PromptTemplate("{prompt}"))
    assert [text.add(0, final=False)[0], text.add(None, final=True)[0]] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_long_prefix_may_come_in_pieces() -> None:
    template = PromptTemplate("{prompt}", completion_prefix="A: ", stop=("\nB:",))
    text = ShownText(template)
    assert [text.add(piece, final=False)[0] for piece in ("A", ": ", "A", "nd", "\nB")] == ["", "", "", "And", ""]
    assert text.add(":", final=False) == ("", True)
