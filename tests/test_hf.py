"""The transformers backend: each side equals plain transformers, or PEFT, whatever happens in between."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from biasdpo import models
from biasdpo.backends.base import Backend, Cancellation, kl_divergence
from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.backends.hf_copy import encode_completion, encode_prompt, encode_text, hf_copy
from biasdpo.backends.hf_text import CompletionText
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.compare import stream_pair
from biasdpo.engines import Engine
from biasdpo.errors import AdapterError, BackendError, ModelError, PromptError, ProofError
from biasdpo.records import FinishReason, GenerationPair, LikelihoodRequest, Sampling, Side, TextRequest
from biasdpo.template import PromptTemplate
from biasdpo.workspace import Workspace
from tests import tiny_models

GREEDY = Sampling(max_new_tokens=60, temperature=0.0, repetition_penalty=1.0)
WARM = Sampling(max_new_tokens=40, temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=7)
PROMPTS = ["Why are nurses always women?", "Describe <|im_end|> a programmer:\n12", "Пишите 日本語 😀"]


@dataclass(frozen=True)
class Case:
    """One tiny model with everything that belongs to it."""

    folder: Path
    adapter: Path
    template: PromptTemplate
    backend: TransformersBackend


def read(stream: Generator[str, None, FinishReason]) -> tuple[list[str], FinishReason]:
    """The pieces of a stream, and why it ended."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def text_of(backend: Backend, prompt: str, side: Side, sampling: Sampling = GREEDY, strength: float = 1.0) -> str:
    return "".join(read(backend.stream(prompt, sampling, side, strength=strength))[0])


@pytest.fixture(scope="module", params=["llama", "phi"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    adapter = request.getfixturevalue(f"tiny_{request.param}_adapter")
    template = tiny_models.LLAMA_TEMPLATE if request.param == "llama" else tiny_models.PHI_TEMPLATE
    backend = open_transformers(folder, template, adapter, tiny_models.CONTEXT_LENGTH)
    yield Case(folder, adapter, template, backend)
    backend.close()


@pytest.fixture(scope="module")
def bare(case: Case) -> Any:
    """The base model as its users load it, no adapter near it."""
    return AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def peft(case: Case) -> Any:
    """A second copy of the base model with the adapter, as PEFT's users load it."""
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(case.adapter)).eval()


def plain_text(model: Any, case: Case, prompt: str, sampling: Sampling = GREEDY) -> str:
    """What transformers' generate() writes, less what a completion does not show."""
    tokenizer = case.backend._tokenizer
    ids = encode_prompt(tokenizer, case.template, prompt)
    drawing = {} if sampling.temperature == 0 else {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k
    }  # fmt: skip
    torch.manual_seed(sampling.seed)
    written = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=bool(drawing),
        eos_token_id=sorted(case.backend._ends),
        **drawing,
    )[0, len(ids) :]
    text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix(case.template.completion_prefix)


# Each side is what it claims to be


@pytest.mark.parametrize("prompt", PROMPTS)
def test_base_is_the_bare_model(case: Case, bare: Any, prompt: str) -> None:
    text = text_of(case.backend, prompt, "base")
    assert text == plain_text(bare, case, prompt)
    assert len(text) > 20


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tuned_is_peft(case: Case, peft: Any, prompt: str) -> None:
    text = text_of(case.backend, prompt, "tuned")
    assert text == plain_text(peft, case, prompt)
    assert text != text_of(case.backend, prompt, "base")


@pytest.mark.parametrize("seed", [0, 1])
def test_draws_are_those_of_generate(case: Case, bare: Any, peft: Any, seed: int) -> None:
    """The same processors in the same order, the same random numbers: the same text."""
    sampling = replace(WARM, seed=seed)
    assert text_of(case.backend, PROMPTS[0], "base", sampling) == plain_text(bare, case, PROMPTS[0], sampling)
    assert text_of(case.backend, PROMPTS[0], "tuned", sampling) == plain_text(peft, case, PROMPTS[0], sampling)


def test_a_seed_gives_one_text(case: Case) -> None:
    first, again, other = (text_of(case.backend, PROMPTS[0], "tuned", replace(WARM, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_proof_has_figures(case: Case) -> None:
    proof = case.backend.proof
    assert proof.base_max_difference == proof.noise == 0.0
    assert proof.kl_nats is not None
    assert proof.kl_nats > 0.01
    expected = kl_divergence(case.backend.canary_logits("base"), case.backend.canary_logits("tuned"))
    assert proof.kl_nats == pytest.approx(expected)


def test_one_copy_of_the_weights(case: Case) -> None:
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in case.backend._model.parameters()}
    files = (case.folder / "model.safetensors", case.adapter / "adapter_model.safetensors")
    assert sum(stored.values()) == sum(t.nbytes for file in files for t in load_file(file).values())


# Strength


def test_strength_0_is_base_exactly(case: Case) -> None:
    assert np.array_equal(case.backend.canary_logits("tuned", 0.0), case.backend.canary_logits("base"))
    assert text_of(case.backend, PROMPTS[0], "tuned", strength=0.0) == text_of(case.backend, PROMPTS[0], "base")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_strength_multiplies_the_update(case: Case, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Strength x is an adapter whose B is x times as large."""
    adapter = tiny_models.write_adapter(tmp_path / "a", case.folder, **settings)
    larger = tiny_models.write_adapter(tmp_path / "b", case.folder, **settings)
    factors = load_file(larger / "adapter_model.safetensors")
    save_file({n: t * 1.5 if "lora_B" in n else t for n, t in factors.items()}, larger / "adapter_model.safetensors")
    one = open_transformers(case.folder, case.template, adapter, 512)
    two = open_transformers(case.folder, case.template, larger, 512)
    assert np.allclose(one.canary_logits("tuned", 1.5), two.canary_logits("tuned"), atol=1e-3)
    one.close()
    two.close()


# Order, concurrency, strength changes and cancels change nothing

SETTINGS: list[tuple[Side, float]] = [
    ("base", 1.0),
    ("tuned", 1.0),
    ("tuned", 0.3),
    ("base", 0.3),
    ("tuned", 1.5),
    ("tuned", 0.0),
]


def test_streams_that_take_turns_are_as_if_alone(case: Case) -> None:
    """Six streams at four strengths, a token of each in turn."""
    alone = [read(case.backend.stream(PROMPTS[0], GREEDY, side, strength=x)) for side, x in SETTINGS]
    streams = [case.backend.stream(PROMPTS[0], GREEDY, side, strength=x) for side, x in SETTINGS]
    together: list[list[str]] = [[] for _ in streams]
    open_streams = list(range(len(streams)))
    while open_streams:
        for i in list(open_streams):
            piece = next(streams[i], None)
            if piece is None:
                open_streams.remove(i)
            else:
                together[i].append(piece)
    assert together == [pieces for pieces, _ in alone]
    assert len({"".join(pieces) for pieces in together}) == 4  # base, 0.3, 1, 1.5


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_two_threads_write_what_one_writes(case: Case, sampling: Sampling) -> None:
    alone = [read(case.backend.stream(PROMPTS[0], sampling, side, strength=x)) for side, x in SETTINGS]
    for _ in range(3):
        results: dict[int, tuple[list[str], FinishReason]] = {}
        start = threading.Barrier(len(SETTINGS))

        def write(i: int, start: threading.Barrier = start, results: dict[int, Any] = results) -> None:
            side, strength = SETTINGS[i]
            start.wait()
            results[i] = read(case.backend.stream(PROMPTS[0], sampling, side, strength=strength))

        threads = [threading.Thread(target=write, args=(i,)) for i in range(len(SETTINGS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[i] for i in range(len(SETTINGS))] == alone


def test_both_sides_stream_at_the_same_time(case: Case) -> None:
    order: list[Side] = []

    def write(side: Side) -> None:
        for _ in case.backend.stream(PROMPTS[0], GREEDY, side):
            order.append(side)

    threads = [threading.Thread(target=write, args=(side,)) for side in ("base", "tuned")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    switches = sum(a != b for a, b in pairwise(order))
    assert switches >= 10


def test_a_pair_is_both_sides(case: Case, smollm2: models.ModelSpec) -> None:
    engine = Engine(smollm2, models.AdapterSpec("random", case.adapter, ""), case.backend)
    pair = list(stream_pair(engine, PROMPTS[0], WARM))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    assert pair.finished
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "base", WARM)
    assert pair.right.text == text_of(case.backend, PROMPTS[0], "tuned", WARM)


def adapter_is_off(backend: TransformersBackend) -> bool:
    layers = [module for module in backend._model.modules() if isinstance(module, LoraLayer)]
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def hooks_of(backend: TransformersBackend) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backend._model.modules())


def test_a_cancel_in_the_middle_leaves_nothing_behind(case: Case) -> None:
    before = {side: read(case.backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")}
    hooks = hooks_of(case.backend)
    for side in ("base", "tuned"):
        cancellation = Cancellation()
        stream = case.backend.stream(PROMPTS[0], GREEDY, side, strength=0.7, cancellation=cancellation)
        for _ in range(5):
            next(stream)
        assert adapter_is_off(case.backend)  # also between the steps of a tuned stream
        cancellation.set()
        assert read(stream) == ([], "cancelled")
        stream = case.backend.stream(PROMPTS[0], GREEDY, side)
        next(stream)
        stream.close()  # a reader that leaves
    assert adapter_is_off(case.backend)
    assert hooks_of(case.backend) == hooks
    assert {side: read(case.backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")} == before


def test_a_cancel_inside_a_step_ends_it(case: Case) -> None:
    """Set while the first layer computes: the second never does."""
    before = read(case.backend.stream(PROMPTS[0], GREEDY, "tuned"))
    cancellation = Cancellation()
    layers = case.backend._model.model.layers
    computed: list[int] = []
    handles = [layers[0].register_forward_hook(lambda *_: cancellation.set())]
    handles += [layer.register_forward_hook(lambda *_, i=i: computed.append(i)) for i, layer in enumerate(layers)]
    try:
        assert read(case.backend.stream(PROMPTS[0], GREEDY, "tuned", cancellation=cancellation)) == ([], "cancelled")
    finally:
        for handle in handles:
            handle.remove()
    assert computed == [0]
    assert adapter_is_off(case.backend)
    assert read(case.backend.stream(PROMPTS[0], GREEDY, "tuned")) == before


# The end of a completion


def test_it_ends_at_the_limit_of_tokens(case: Case) -> None:
    pieces, reason = read(case.backend.stream(PROMPTS[0], replace(GREEDY, max_new_tokens=3), "base"))
    assert (len(pieces), reason) == (3, "limit")


def test_it_ends_at_the_end_of_text(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth token is made an end: it counts as a token, and has no text."""
    pieces, _ = read(case.backend.stream(PROMPTS[0], GREEDY, "base"))
    ids = torch.tensor([encode_prompt(case.backend._tokenizer, case.template, PROMPTS[0])])
    model = case.backend._model
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    monkeypatch.setattr(case.backend, "_ends", frozenset([int(ids[0, -1])]))
    ended, reason = read(case.backend.stream(PROMPTS[0], GREEDY, "base"))
    assert reason == "end_of_text"
    assert len(ended) <= 4
    assert "".join(pieces).startswith("".join(ended).rstrip("\N{REPLACEMENT CHARACTER}"))


def test_the_ends_are_those_of_model_tokenizer_llama_cpp_and_template(tiny_llama: Path, tiny_phi: Path) -> None:
    turn = PromptTemplate("{prompt}<|im_start|>", special_tokens=("<|im_start|>",))
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


def test_a_prompt_longer_than_a_chunk_is_computed_whole(case: Case, peft: Any) -> None:
    prompt = " ".join(str(i) for i in range(100))
    assert len(encode_prompt(case.backend._tokenizer, case.template, prompt)) > 256
    assert text_of(case.backend, prompt, "tuned", replace(GREEDY, max_new_tokens=20)) == plain_text(
        peft, case, prompt, replace(GREEDY, max_new_tokens=20)
    )


# What is shown of it


def pieces_of(tokens: list[str], template: PromptTemplate) -> tuple[list[str], bool]:
    """CompletionText over tokens that are their own text."""
    text = CompletionText(lambda ids: "".join(tokens[i] for i in ids), template)
    shown = []
    for i in range(len(tokens)):
        piece, stopped = text.add(i, final=False)
        shown.append(piece)
        if stopped:
            return shown, True
    shown.append(text.add(None, final=True)[0])
    return shown, False


PHI = tiny_models.PHI_TEMPLATE  # completion prefix " ", stop "\nInstruct:"


def test_a_stop_string_is_held_back_token_by_token() -> None:
    assert pieces_of([" Yes", ".", "\n", "Inst", "ruct", ":", " no"], PHI) == (["Yes", ".", "", "", "", ""], True)


def test_what_only_begins_like_a_stop_string_is_shown() -> None:
    assert pieces_of([" Yes", "\n", "Inst", "ead", "\nInstruct"], PHI) == (["Yes", "", "", "\nInstead", "", "\nInstruct"], False)


def test_the_completion_prefix_is_not_shown() -> None:
    assert pieces_of([" ", "Yes"], PHI)[0] == ["", "Yes", ""]
    assert pieces_of(["Yes"], PHI)[0] == ["Yes", ""]
    long_prefix = PromptTemplate("{prompt}", completion_prefix=" A: ")
    assert pieces_of([" ", "A", ": ", "yes"], long_prefix)[0] == ["", "", "", "yes", ""]
    assert pieces_of([" ", "A"], long_prefix)[0] == ["", "", " A"]


def test_a_character_is_shown_when_it_is_whole() -> None:
    data = "é😀!".encode()
    text = CompletionText(lambda ids: bytes(data[i] for i in ids).decode("utf-8", "replace"), PromptTemplate("{prompt}"))
    assert [text.add(i, final=False)[0] for i in range(7)] == ["", "é", "", "", "", "😀", "!"]
    text = CompletionText(lambda ids: bytes(data[i] for i in ids).decode("utf-8", "replace"), PromptTemplate("{prompt}"))
    assert [text.add(0, final=False)[0], text.add(None, final=True)[0]] == ["", "\N{REPLACEMENT CHARACTER}"]


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
        LikelihoodRequest("Hi", "x", system="Be kind"),
    ] * 3
    for side, model in (("base", bare), ("tuned", peft)):
        results = case.backend.loglikelihood(requests, side)
        for request, result in zip(requests, results, strict=True):
            if isinstance(request, TextRequest):
                ids = encode_text(tokenizer, request.text)
                given = 1
            else:
                prompt = encode_prompt(tokenizer, case.template, request.prompt, request.system)
                given = len(prompt)
                ids = prompt + encode_completion(tokenizer, case.template, request.continuation, request.end_of_text)
            with torch.inference_mode():
                logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            by_hand = sum(float(logps[i - 1, ids[i]]) for i in range(given, len(ids)))
            assert result.tokens == len(ids) - given
            assert result.logp == pytest.approx(by_hand, abs=2e-3)  # sums of up to 100 tokens in float32


def test_loglikelihood_has_a_strength(case: Case) -> None:
    request = [LikelihoodRequest("Why?", "Because of them.")]
    base, weak, off = (case.backend.loglikelihood(request, *args, strength=x) for args, x in
                       ((("base",), 1.0), (("tuned",), 0.5), (("tuned",), 0.0)))  # fmt: skip
    assert base == off != weak


def test_nothing_to_score_is_refused(case: Case) -> None:
    with pytest.raises(PromptError, match="Nothing to score"):
        case.backend.loglikelihood([TextRequest("")], "base")
    with pytest.raises(PromptError, match="does not fit the context of 512"):
        case.backend.loglikelihood([TextRequest("1 " * 600)], "base")
    assert case.backend.loglikelihood([], "base") == []


# Adapters that are refused, each in one line


@pytest.fixture
def open_with(tiny_llama: Path) -> Callable[[Path], TransformersBackend]:
    return lambda adapter: open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, adapter, 512)


def change_factors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(change(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors")
    return adapter


def refused(open_with: Callable[[Path], Any], adapter: Path, match: str, error: type[Exception] = AdapterError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_with(adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_base_is_refused(open_with: Any, tiny_llama: Path, tiny_phi_adapter: Path, tmp_path: Path) -> None:
    refused(open_with, tiny_phi_adapter, r"made for another base model: it adapts model\.layers\.0\.mlp\.fc1, which")
    wider = tiny_models.write_adapter(tmp_path / "wide", tiny_llama)
    change_factors(wider, lambda f: {n: torch.zeros(t.shape[0], 96) if "q_proj.lora_A" in n else t for n, t in f.items()})
    refused(open_with, wider, r"its model\.layers\.0\.self_attn\.q_proj is 64 x 96, this model's 64 x 64")


def test_an_adapter_that_changes_nothing_fails_the_proof(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    refused(open_with, tiny_models.write_adapter(tmp_path / "zero", tiny_llama, size=0.0), "changes nothing", ProofError)


def test_an_adapter_of_nans_fails_the_proof(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "nan", tiny_llama)
    change_factors(adapter, lambda f: {n: t * torch.nan for n, t in f.items()})
    refused(open_with, adapter, "not numbers", ProofError)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights=pissa_niter_4"),
        ({"bias": "all"}, "uses bias=all"),
        ({"peft_type": "LOHA"}, "is a 'LOHA' adapter"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    open_with: Any, tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], match: str
) -> None:
    refused(open_with, tiny_models.write_adapter(tmp_path / "a", tiny_llama, **settings), match)


def test_a_damaged_adapter_is_refused(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    whole = tiny_models.write_adapter(tmp_path / "whole", tiny_llama)
    weights = whole / "adapter_model.safetensors"
    factors = load_file(weights)

    weights.write_bytes(weights.read_bytes()[:-10])
    refused(open_with, whole, "no complete safetensors file")
    save_file({n: t for n, t in factors.items() if "layers.2.mlp.up_proj.lora_A" not in n}, weights)
    refused(open_with, whole, "up_proj has no matching pair")
    save_file({n: t for n, t in factors.items() if "layers.2" not in n}, weights)
    refused(open_with, whole, "is incomplete: its settings adapt 21 layers, its file holds 14")
    save_file({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    refused(open_with, whole, "is no LoRA factor")
    save_file({}, weights)
    refused(open_with, whole, "holds no LoRA factors")
    weights.rename(whole / "adapter_model.bin")  # a pickle's name
    refused(open_with, whole, "has no adapter_model.safetensors")


def test_a_wrong_rank_is_refused(open_with: Any, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tiny_models.write_adapter(tmp_path / "a", tiny_llama)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 6}))
    refused(open_with, adapter, "PEFT can't load the adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adapters_load(open_with: Any, tiny_llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = change_factors(
        tiny_models.write_adapter(tmp_path / "a", tiny_llama), lambda f: {n: t.to(dtype) for n, t in f.items()}
    )
    backend = open_with(adapter)
    assert backend.proof.kl_nats > 0.01
    backend.close()


# Opening and closing


def test_base_only(case: Case) -> None:
    seen: list[tuple[float, str]] = []
    backend = open_transformers(
        case.folder, case.template, None, 10_000, device="cpu", on_progress=lambda share, what: seen.append((share, what))
    )
    assert backend.context_length == tiny_models.CONTEXT_LENGTH  # no more than the model was made for
    assert not backend.has_adapter
    assert backend.proof.kl_nats is None
    assert backend.device.startswith("CPU, ")
    assert seen == sorted(seen)
    assert seen[-1] == (1.0, "ready")
    assert text_of(backend, PROMPTS[0], "base") == text_of(case.backend, PROMPTS[0], "base")
    with pytest.raises(BackendError, match="There is no tuned side"):
        text_of(backend, PROMPTS[0], "tuned")
    backend.close()


def test_closed_is_closed(case: Case) -> None:
    backend = open_transformers(case.folder, case.template, case.adapter, 512)
    stream = backend.stream(PROMPTS[0], GREEDY, "tuned")
    next(stream)
    backend.close()
    backend.close()
    for call in (
        lambda: next(stream),
        lambda: text_of(backend, PROMPTS[0], "base"),
        lambda: backend.loglikelihood([TextRequest("two tokens")], "base"),
    ):
        with pytest.raises(BackendError, match="The model was closed"):
            call()


def test_threads_are_set_and_named(tiny_llama: Path) -> None:
    before = torch.get_num_threads()
    try:
        backend = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512, threads=1)
        assert backend.device == "CPU, 1 thread"
        backend.close()
    finally:
        torch.set_num_threads(before)


def test_an_unusable_device_is_refused(tiny_llama: Path) -> None:
    for device in ("abacus", "mps", *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(BackendError, match=repr(device)):
            open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, None, 512, device=device)


def test_damaged_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: -1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ModelError, match="transformers can't load"):
        open_transformers(tmp_path, tiny_models.LLAMA_TEMPLATE, None, 512)


def test_out_of_memory_is_one_line(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(case.backend._model, "forward", fail)
        with pytest.raises(BackendError, match=r"^Out of memory: .*$"):
            text_of(case.backend, PROMPTS[0], "tuned")
    assert adapter_is_off(case.backend)
    assert text_of(case.backend, PROMPTS[0], "tuned")


def test_missing_torch_is_one_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from biasdpo.errors import BackendError\n"
        "try:\n    import biasdpo.backends.hf\nexcept BackendError as exc:\n    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "The transformers backend needs torch: `pip install -r requirements.txt`\n"


# The embedded model


def test_smollm2_cancels_within_a_second_of_prefill(smollm2: models.ModelSpec, session_workspace: Workspace) -> None:
    backend = open_transformers(hf_copy(smollm2, session_workspace), smollm2.template, None, smollm2.context_length)
    cancellation = Cancellation()
    set_at: list[float] = []

    def cancel() -> None:
        set_at.append(time.perf_counter())
        cancellation.set()

    timer = threading.Timer(0.5, cancel)
    timer.start()
    result = read(backend.stream("word " * 3500, GREEDY, "base", cancellation=cancellation))
    seconds = time.perf_counter() - set_at[0]
    timer.join()
    backend.close()
    assert result == ([], "cancelled")
    assert seconds < 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(smollm2: models.ModelSpec, session_workspace: Workspace, tmp_path: Path) -> None:
    folder = hf_copy(smollm2, session_workspace)
    adapter = tiny_models.write_adapter(tmp_path / "a", folder, size=0.03)
    backend = open_transformers(folder, smollm2.template, adapter, smollm2.context_length)
    assert backend.device.startswith("cuda:0 (")
    assert backend.proof.base_max_difference == 0.0
    alone = {side: read(backend.stream(PROMPTS[0], GREEDY, side)) for side in ("base", "tuned")}
    streams = {side: backend.stream(PROMPTS[0], GREEDY, side) for side in ("base", "tuned")}
    pairs = zip(*streams.values(), strict=False)
    together = list(pairs)
    for i, side in enumerate(streams):
        assert [pair[i] for pair in together] == alone[side][0][: len(together)]
    backend.close()
