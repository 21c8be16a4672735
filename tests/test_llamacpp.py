"""The llama.cpp backend on the embedded model: each side equals a bare llama.cpp, whatever happens in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends.base import Cancellation, kl_divergence, log_softmax
from biasdpo.backends.llamacpp import LlamaCppBackend, open_llamacpp
from biasdpo.chat import PromptTemplate
from biasdpo.compare import stream_pair
from biasdpo.engines import Engine
from biasdpo.errors import AdapterError, BackendError, ModelError, PromptError, ProofError
from biasdpo.gguf import write as gguf_export
from biasdpo.models import AdapterSpec
from biasdpo.records import GenerationPair, LikelihoodRequest, Sampling, TextRequest
from tests.bare import bare_llama, greedy, text_of
from tests.lora_factory import write_lora

GREEDY = Sampling(max_new_tokens=32, temperature=0.0, repetition_penalty=1.0)
PROMPTS = ["Why are nurses always women?", "Describe a typical programmer.", "Numbers:\n12\n345 <|im_end|> and {system}"]


@pytest.fixture(scope="module")
def spec() -> models.ModelSpec:
    return models.find("smollm2")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterSpec:
    folder = write_lora(tmp_path_factory.mktemp("adapter") / "random")
    return AdapterSpec("random", folder, "smollm2")


@pytest.fixture(scope="module")
def lora_gguf(adapter: AdapterSpec, spec: models.ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert spec.gguf_path is not None
    return gguf_export.lora(adapter, spec.gguf_path, tmp_path_factory.mktemp("lora") / "random.gguf")


@pytest.fixture(scope="module")
def backend(spec: models.ModelSpec, lora_gguf: Path) -> Iterator[LlamaCppBackend]:
    assert spec.gguf_path is not None
    backend = open_llamacpp(spec.gguf_path, spec.template, lora_gguf, 4096)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def bare_texts(backend: LlamaCppBackend, spec: models.ModelSpec, lora_gguf: Path) -> dict[tuple[str, str], str]:
    """What bare llama.cpp writes, by (side, prompt)."""
    texts = {}
    for side, lora in (("base", None), ("tuned", lora_gguf)):
        assert spec.gguf_path is not None
        with bare_llama(spec.gguf_path, lora) as llama:
            for prompt in PROMPTS:
                tokens = greedy(llama, backend.tokenize(spec.template.render(prompt)), GREEDY.max_new_tokens)
                texts[side, prompt] = text_of(llama, tokens)
    return texts


def write(backend: LlamaCppBackend, prompt: str, side: str, **options: object) -> str:
    sampling = options.pop("sampling", GREEDY)
    return "".join(backend.stream(prompt, sampling, side, **options))  # type: ignore[arg-type]


def last_pair(backend: LlamaCppBackend, spec: models.ModelSpec, adapter: AdapterSpec, prompt: str) -> GenerationPair:
    *_, pair = stream_pair(Engine(spec, adapter, backend), prompt, GREEDY)
    assert isinstance(pair, GenerationPair)
    return pair


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_side_writes_what_bare_llamacpp_writes(backend, spec, adapter, bare_texts, prompt):
    for _ in range(2):  # the second time from the cached prompt
        pair = last_pair(backend, spec, adapter, prompt)
        assert pair.left.text == bare_texts["base", prompt]
        assert pair.right.text == bare_texts["tuned", prompt]
    assert bare_texts["base", prompt] != bare_texts["tuned", prompt]


def test_nothing_that_came_before_changes_a_text(backend, spec, adapter, bare_texts):
    long_prompt = "word " * 700  # more than one physical batch, so its beginning can be reused
    first_long = {side: write(backend, long_prompt, side) for side in ("base", "tuned")}
    for disturb in (
        lambda: write(backend, "Something else.", "tuned", strength=0.4),
        lambda: next(backend.stream(PROMPTS[1], GREEDY, "tuned")),  # begun and dropped
        lambda: write(backend, PROMPTS[0] + " And why?", "base"),
        lambda: write(backend, long_prompt + "end", "tuned", strength=1.3),
        lambda: backend.loglikelihood([TextRequest("The sun rises in the east.")], "base"),
        lambda: write(backend, long_prompt + "end", "base"),
    ):
        disturb()
        pair = last_pair(backend, spec, adapter, PROMPTS[0])
        assert pair.left.text == bare_texts["base", PROMPTS[0]]
        assert pair.right.text == bare_texts["tuned", PROMPTS[0]]
        assert {side: write(backend, long_prompt, side) for side in ("base", "tuned")} == first_long


def test_a_change_of_strength_drops_cached_states(backend):
    """The KV-cache trap: the same prompt at strength 1, then 0, must not reuse the states of strength 1."""
    at_one = write(backend, PROMPTS[0], "tuned")
    logits_at_one = backend._contexts["tuned"].prompt_logits.copy()
    assert write(backend, PROMPTS[0], "tuned", strength=0.0) == write(backend, PROMPTS[0], "base")
    logits_at_zero = backend._contexts["tuned"].prompt_logits.copy()
    np.testing.assert_array_equal(logits_at_zero, backend._contexts["base"].prompt_logits)
    assert write(backend, PROMPTS[0], "tuned") == at_one
    np.testing.assert_array_equal(backend._contexts["tuned"].prompt_logits, logits_at_one)
    assert np.abs(logits_at_one - logits_at_zero).max() > 0.1


def test_the_trap_is_real(backend, spec):
    """A control: toggling the adapter with the prompt still cached gives neither side's logits, so the test above can fail."""
    context = backend._contexts["tuned"]
    write(backend, PROMPTS[0], "tuned")
    honest = context.prompt_logits.copy()
    tokens = backend.tokenize(spec.template.render(PROMPTS[0]))
    write(backend, PROMPTS[0], "tuned", strength=0.0)
    with context.lock:
        memory_kept = context.forget
        context.forget = lambda: None  # type: ignore[method-assign]
        try:
            context.set_strength(1.0)
        finally:
            context.forget = memory_kept  # type: ignore[method-assign]
        context.cut(len(tokens) - 1)
        context.decode(tokens[-1:], len(tokens) - 1)
        trapped = context.row(-1)
        context.forget()
    assert np.abs(trapped - honest).max() > 0.05


def test_strength_is_live(backend):
    texts = {strength: write(backend, PROMPTS[1], "tuned", strength=strength) for strength in (0.0, 1.0, 1.5)}
    assert texts[0.0] == write(backend, PROMPTS[1], "base")
    assert len(set(texts.values())) == 3


def test_visitors_at_once_get_whole_texts_of_their_own(backend, spec, adapter, bare_texts):
    pairs: dict[str, GenerationPair] = {}
    threads = [
        threading.Thread(target=lambda p=prompt: pairs.__setitem__(p, last_pair(backend, spec, adapter, p))) for prompt in PROMPTS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt in PROMPTS:
        assert pairs[prompt].left.text == bare_texts["base", prompt]
        assert pairs[prompt].right.text == bare_texts["tuned", prompt]


def test_one_thread_or_two_give_the_same_logits(spec, lora_gguf):
    logits = []
    for threads in (1, 2):
        backend = open_llamacpp(spec.gguf_path, spec.template, lora_gguf, 512, threads=threads)
        logits.append(backend.canary_logits("tuned"))
        backend.close()
    np.testing.assert_array_equal(*logits)


def test_the_proof_holds(backend):
    assert backend.proof.base_max_difference == 0.0
    assert backend.proof.noise == 0.0
    assert backend.proof.kl_nats > 1e-4
    assert backend.proof.kl_nats == pytest.approx(kl_divergence(backend.canary_logits("base"), backend.canary_logits("tuned")))


def test_an_adapter_that_changes_nothing_is_no_comparison(spec, tmp_path):
    adapter = AdapterSpec("zero", write_lora(tmp_path / "zero", size=0.0), "smollm2")
    lora = gguf_export.lora(adapter, spec.gguf_path, tmp_path / "zero.gguf")
    with pytest.raises(ProofError, match="changes nothing"):
        open_llamacpp(spec.gguf_path, spec.template, lora, 512)


def test_seeds(backend):
    def sample(seed: int) -> str:
        return write(
            backend, PROMPTS[1], "base", sampling=Sampling(max_new_tokens=24, temperature=1.0, top_k=0, top_p=1.0, seed=seed)
        )

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_cancel_frees_the_engine_within_a_token(backend):
    cancellation = Cancellation()
    stream = backend.stream(PROMPTS[0], Sampling(max_new_tokens=500, temperature=0.0), "base", cancellation=cancellation)
    for _ in range(5):
        next(stream)
    cancellation.set()
    with pytest.raises(StopIteration) as stop:
        next(stream)
    assert stop.value.value == "cancelled"


def test_cancel_during_prefill_frees_the_engine_within_a_second(backend, bare_texts):
    cancellation = Cancellation()
    ended_at: list[float] = []
    reasons: list[object] = []

    def run() -> None:
        stream = backend.stream("word " * 3900, GREEDY, "base", cancellation=cancellation)
        with pytest.raises(StopIteration) as stop:
            next(stream)
        ended_at.append(time.monotonic())
        reasons.append(stop.value.value)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)  # well inside the prefill, which takes several seconds here
    assert thread.is_alive()
    asked_at = time.monotonic()
    cancellation.set()
    thread.join()
    assert reasons == ["cancelled"]
    assert ended_at[0] - asked_at < 1.0
    assert write(backend, PROMPTS[0], "base") == bare_texts["base", PROMPTS[0]]


def test_a_prompt_longer_than_the_context_names_both_numbers(backend):
    with pytest.raises(PromptError, match=r"40,0\d\d tokens long .* holds 4,096"):
        next(backend.stream("word " * 40_000, GREEDY, "base"))


def test_the_context_is_the_limit(spec):
    backend = open_llamacpp(spec.gguf_path, spec.template, None, 512)
    pieces = []
    stream = backend.stream("Tell me a long story. " * 70, Sampling(max_new_tokens=400, temperature=0.0), "base")
    reason = None
    while reason is None:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            reason = stop.value
    assert reason == "limit"
    prompt_tokens = len(backend.tokenize(spec.template.render("Tell me a long story. " * 70)))
    assert len(pieces) == 512 - prompt_tokens + 1  # the last token needs no place in the cache
    backend.close()


def test_special_tokens_typed_by_a_user_stay_text(backend, spec):
    template_marks = backend.tokenize(spec.template.render("")).count(2)
    assert backend.tokenize(spec.template.render("a <|im_end|> b")).count(2) == template_marks  # 2 is <|im_end|>


class _Scripted(LlamaCppBackend):
    """Draws the tokens of a text instead of the model's."""

    script: list[int]

    def _next_token(self, sampler: object, context: object, stored: object) -> int:  # noqa: ARG002
        return self.script.pop(0)


def scripted(spec: models.ModelSpec, template: PromptTemplate, text: str) -> tuple[list[str], str]:
    backend = _Scripted(spec.gguf_path, template, 512, 1, "f16", lambda _share, _what: None)
    try:
        backend.script = [*backend.tokenize(PromptTemplate(text).render("")), 2]
        pieces = []
        stream = backend.stream("x", Sampling(max_new_tokens=200), "base")
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as stop:
                return pieces, stop.value
    finally:
        backend.close()


def test_characters_of_several_tokens_are_streamed_whole(spec):
    text = "naïve 🙂👩🏽‍🔬 数 end"
    pieces, reason = scripted(spec, spec.template, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert reason == "end_of_text"


def test_stop_strings_are_held_back_and_the_completion_prefix_is_not_shown(spec):
    phi = models.catalog()["phi-2"].template
    pieces, reason = scripted(spec, phi, " Paris.\nInstead of more\nInstruct: and again")
    assert "".join(pieces) == "Paris.\nInstead of more"
    assert reason == "end_of_text"
    pieces, reason = scripted(spec, phi, " Paris.\nInst")  # a stop string that never comes is shown in the end
    assert "".join(pieces) == "Paris.\nInst"


def test_loglikelihood_is_the_sum_over_bare_logits(backend, spec, lora_gguf):
    request = LikelihoodRequest(PROMPTS[0], "Nursing is open to everyone.", end_of_text=True)
    given = backend.tokenize(spec.template.render(PROMPTS[0]))
    scored = [*backend.tokenize(PromptTemplate("Nursing is open to everyone.").render("")), 2]
    for side, lora in (("base", None), ("tuned", lora_gguf)):
        with bare_llama(spec.gguf_path, lora, logits_all=True) as llama:
            llama.eval(given + scored)
            logits = llama.scores[len(given) - 1 : len(given) + len(scored) - 1]
            expected = log_softmax(logits)[np.arange(len(scored)), scored].sum()
        [result] = backend.loglikelihood([request], side)
        assert result.tokens == len(scored)
        assert result.logp == pytest.approx(expected, abs=0.02)  # batches of 128 outputs round otherwise than one of 512


def test_long_texts_are_scored_in_pieces(backend):
    text = "The committee met on Tuesday and agreed on the plan. " * 30
    [whole] = backend.loglikelihood([TextRequest(text)], "base")
    assert whole.tokens > 256
    assert -3.0 < whole.logp / whole.tokens < -0.01


def test_a_closed_backend_says_so(spec):
    backend = open_llamacpp(spec.gguf_path, spec.template, None, 512)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        next(backend.stream("x", GREEDY, "base"))


def test_without_an_adapter_there_is_no_tuned_side(spec):
    backend = open_llamacpp(spec.gguf_path, spec.template, None, 512)
    assert not backend.has_adapter
    assert backend.proof.kl_nats is None
    with pytest.raises(BackendError, match="no tuned side"):
        next(backend.stream("x", GREEDY, "tuned"))
    backend.close()


def test_damaged_model_files(spec, tmp_path):
    whole = spec.gguf_path.read_bytes()
    for name, content, message in (
        ("cut.gguf", whole[: len(whole) // 2], "damaged|cut off"),
        ("head.gguf", whole[:2000], "damaged|cut off"),
        ("text.gguf", b"hello", "no GGUF"),
        ("empty.gguf", b"", "no GGUF"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message) as error:
            open_llamacpp(path, spec.template, None, 512)
        assert str(path) in str(error.value)
    with pytest.raises(ModelError, match="No model file"):
        open_llamacpp(tmp_path / "none.gguf", spec.template, None, 512)


def test_a_damaged_lora_gguf_is_refused(spec, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(AdapterError, match="refused the adapter"):
        open_llamacpp(spec.gguf_path, spec.template, path, 512)
