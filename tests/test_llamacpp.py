"""The llama.cpp backend: each side equals bare llama.cpp, whatever happens in between. On tiny models; on SmolLM2 where speed or
quantization matters."""

from __future__ import annotations

import threading
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
from tests import tiny_models
from tests.bare import bare_llama, greedy, text_of
from tests.hf.cases import read, seconds_to_cancel
from tests.lora_factory import write_lora

GREEDY = Sampling(max_new_tokens=24, temperature=0.0, repetition_penalty=1.0)
PROMPTS = ["Why are nurses always women?", "Describe a typical programmer.", "Numbers:\n12\n345 <|im_end|> and {system}"]
LONG = "word " * 250  # more than one physical batch of tokens
TEMPLATE = tiny_models.LLAMA_TEMPLATE
CONTEXT = 2048


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a context of several physical batches."""
    folder = tmp_path_factory.mktemp("long")
    tiny_models.save_tiny_llama(folder / "hf", max_position_embeddings=CONTEXT)
    return tiny_models.write_llama_gguf(folder / "hf", folder / "long.gguf")


@pytest.fixture(scope="module")
def lora(gguf: Path) -> Path:
    adapter = AdapterSpec("tiny", tiny_models.write_adapter(gguf.parent / "lora", gguf.parent / "hf"), "")
    return gguf_export.lora(adapter, gguf, gguf.parent / "lora.gguf")


@pytest.fixture(scope="module")
def backend(gguf: Path, lora: Path) -> Iterator[LlamaCppBackend]:
    backend = open_llamacpp(gguf, TEMPLATE, lora, 4096)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def engine(backend: LlamaCppBackend, smollm2: models.ModelSpec) -> Engine:
    return Engine(smollm2, AdapterSpec("tiny", Path(), ""), backend)


@pytest.fixture(scope="module")
def bare_texts(backend: LlamaCppBackend, gguf: Path, lora: Path) -> dict[tuple[str, str], str]:
    """What bare llama.cpp writes, by (side, prompt)."""
    texts = {}
    for side, file in (("base", None), ("tuned", lora)):
        with bare_llama(gguf, file, context_length=CONTEXT) as llama:
            for prompt in (*PROMPTS, LONG):
                tokens = greedy(llama, backend.tokenize(TEMPLATE.render(prompt)), GREEDY.max_new_tokens)
                texts[side, prompt] = text_of(llama, tokens)
    return texts


def write(backend: LlamaCppBackend, prompt: str, side: str, **options: object) -> str:
    sampling = options.pop("sampling", GREEDY)
    return "".join(backend.stream(prompt, sampling, side, **options))  # type: ignore[arg-type]


def texts_of(engine: Engine, prompt: str) -> tuple[str, str]:
    *_, pair = stream_pair(engine, prompt, GREEDY)
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    return pair.left.text, pair.right.text


@pytest.mark.parametrize("prompt", [*PROMPTS, LONG])
def test_each_side_writes_what_bare_llamacpp_writes(engine, bare_texts, prompt):
    bare = bare_texts["base", prompt], bare_texts["tuned", prompt]
    assert texts_of(engine, prompt) == bare == texts_of(engine, prompt)  # the second time from the cached prompt
    assert bare[0] != bare[1]


def test_nothing_that_came_before_changes_a_text(engine, backend, bare_texts):
    for disturb in (
        lambda: write(backend, "Something else.", "tuned", strength=0.4),
        lambda: next(backend.stream(PROMPTS[1], GREEDY, "tuned")),  # started and dropped
        lambda: write(backend, PROMPTS[0] + " And why?", "base"),
        lambda: write(backend, LONG + "end", "tuned", strength=1.3),
        lambda: backend.loglikelihood([TextRequest("The sun rises in the east.")], "base"),
        lambda: write(backend, LONG + "end", "base"),
    ):
        disturb()
        for prompt in (PROMPTS[0], LONG):
            assert texts_of(engine, prompt) == (bare_texts["base", prompt], bare_texts["tuned", prompt])


def test_visitors_at_once_get_whole_texts_of_their_own(engine, bare_texts):
    pairs: dict[str, tuple[str, str]] = {}
    threads = [threading.Thread(target=lambda p=prompt: pairs.__setitem__(p, texts_of(engine, p))) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pairs == {prompt: (bare_texts["base", prompt], bare_texts["tuned", prompt]) for prompt in PROMPTS}


def test_a_change_of_strength_drops_cached_states(backend):
    """The KV-cache trap: the same prompt at strength 1, then 0, must not reuse the states of strength 1."""
    tuned, base = backend._contexts["tuned"], backend._contexts["base"]
    at_one, logits_at_one = write(backend, PROMPTS[0], "tuned"), tuned.prompt_logits.copy()
    assert write(backend, PROMPTS[0], "tuned", strength=0.0) == write(backend, PROMPTS[0], "base")
    np.testing.assert_array_equal(tuned.prompt_logits, base.prompt_logits)
    assert np.abs(logits_at_one - tuned.prompt_logits).max() > 0.1
    assert write(backend, PROMPTS[0], "tuned") == at_one
    np.testing.assert_array_equal(tuned.prompt_logits, logits_at_one)
    assert write(backend, PROMPTS[0], "tuned", strength=1.5) not in (at_one, write(backend, PROMPTS[0], "base"))


def test_the_trap_is_real(backend, monkeypatch):
    """A control: toggling the adapter with the prompt still cached gives neither side's logits, so the test above can fail."""
    context = backend._contexts["tuned"]
    write(backend, PROMPTS[0], "tuned")
    honest = context.prompt_logits.copy()
    tokens = backend.tokenize(TEMPLATE.render(PROMPTS[0]))
    write(backend, PROMPTS[0], "tuned", strength=0.0)
    with context.lock:
        with monkeypatch.context() as patch:
            patch.setattr(context, "forget", lambda: None)
            context.set_strength(1.0)
        context.cut(len(tokens) - 1)
        context.decode(tokens[-1:], len(tokens) - 1)
        trapped = context.row(-1)
        context.forget()
    assert np.abs(trapped - honest).max() > 0.05


def test_the_proof(backend, gguf, tmp_path):
    assert backend.proof.base_max_difference == backend.proof.noise == 0.0
    kl = kl_divergence(backend.canary_logits("base"), backend.canary_logits("tuned"))
    assert backend.proof.kl_nats == pytest.approx(kl)
    assert kl > 1e-4
    zero = AdapterSpec("zero", tiny_models.write_adapter(tmp_path / "zero", gguf.parent / "hf", size=0.0), "")
    with pytest.raises(ProofError, match="changes nothing"):
        open_llamacpp(gguf, TEMPLATE, gguf_export.lora(zero, gguf, tmp_path / "zero.gguf"), 512)


def test_one_thread_or_two_give_the_same_logits(gguf, lora):
    logits = []
    for threads in (1, 2):
        backend = open_llamacpp(gguf, TEMPLATE, lora, 512, threads=threads)
        logits.append(backend.canary_logits("tuned"))
        backend.close()
    np.testing.assert_array_equal(*logits)


def test_seeds(backend):
    first, again, other = (
        write(backend, PROMPTS[1], "base", sampling=Sampling(24, temperature=1.0, top_k=0, top_p=1.0, seed=seed))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_cancel_ends_a_stream_within_a_token(backend):
    cancellation = Cancellation()
    stream = backend.stream(PROMPTS[0], Sampling(500, temperature=1.5, top_k=0, top_p=1.0), "base", cancellation=cancellation)
    for _ in range(5):
        next(stream)
    cancellation.set()
    assert read(stream) == ([], "cancelled")


def test_a_prompt_that_does_not_fit_names_both_numbers(backend):
    with pytest.raises(PromptError, match=r"\d,\d\d\d tokens long .* holds 2,048"):
        next(backend.stream("word " * 4000, GREEDY, "base"))


def test_the_context_is_the_limit(gguf, monkeypatch):
    backend = open_llamacpp(gguf, TEMPLATE, None, 512)
    monkeypatch.setattr(backend, "_next_token", lambda *_: 70)  # never an end of text
    prompt = "Tell me a long story. " * 15
    pieces, reason = read(backend.stream(prompt, Sampling(400, temperature=0.0), "base"))
    room = 512 - len(backend.tokenize(TEMPLATE.render(prompt)))
    assert 0 < room < 400
    assert (len(pieces), reason) == (room + 1, "limit")  # the last token needs no place in the cache
    backend.close()


def test_characters_of_several_tokens_are_streamed_whole(backend, monkeypatch):
    text = "naïve 🙂👩🏽‍🔬 数 end"
    script = [*backend.tokenize(PromptTemplate(text).render("")), 2]
    monkeypatch.setattr(backend, "_next_token", lambda *_: script.pop(0))
    pieces, reason = read(backend.stream("x", Sampling(max_new_tokens=200), "base"))
    assert ("".join(pieces), reason) == (text, "end_of_text")
    assert not any("\ufffd" in piece for piece in pieces)


def test_loglikelihood_is_the_sum_over_bare_logits(backend, gguf, lora):
    request = LikelihoodRequest(PROMPTS[0], "Nursing is open to everyone.", end_of_text=True)
    given = backend.tokenize(TEMPLATE.render(PROMPTS[0]))
    scored = [*backend.tokenize(PromptTemplate("Nursing is open to everyone.").render("")), 2]
    for side, file in (("base", None), ("tuned", lora)):
        with bare_llama(gguf, file, context_length=CONTEXT, logits_all=True) as llama:
            llama.eval(given + scored)
            logits = llama.scores[len(given) - 1 : len(given) + len(scored) - 1]
            expected = log_softmax(logits)[np.arange(len(scored)), scored].sum()
        [result] = backend.loglikelihood([request], side)
        assert result.tokens == len(scored)
        assert result.logp == pytest.approx(expected, abs=0.02)  # batches of 128 outputs round differently than one of 512


def test_without_an_adapter_there_is_no_tuned_side_and_a_closed_backend_says_so(gguf):
    backend = open_llamacpp(gguf, TEMPLATE, None, 512)
    assert not backend.has_adapter
    assert backend.proof.kl_nats is None
    with pytest.raises(BackendError, match="no tuned side"):
        next(backend.stream("x", GREEDY, "tuned"))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        next(backend.stream("x", GREEDY, "base"))


def test_damaged_files_are_one_line(gguf, tmp_path):
    """Of a model, what test_model_files tells; of an adapter, what llama.cpp says."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"broken\.gguf is (truncated|not a complete GGUF)"):
        open_llamacpp(broken, TEMPLATE, None, 512)
    broken.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(AdapterError, match="refused the adapter"):
        open_llamacpp(gguf, TEMPLATE, broken, 512)


# The embedded model: quantized, and slow enough to be cancelled while it reads a prompt


@pytest.mark.slow
def test_smollm2_writes_what_bare_llamacpp_writes(smollm2, tmp_path):
    adapter = AdapterSpec("random", write_lora(tmp_path / "random"), "smollm2")
    lora = gguf_export.lora(adapter, smollm2.gguf_path, tmp_path / "random.gguf")
    backend = open_llamacpp(smollm2.gguf_path, smollm2.template, lora, 1024)
    texts = texts_of(Engine(smollm2, adapter, backend), PROMPTS[0])
    tokens = backend.tokenize(smollm2.template.render(PROMPTS[0]))
    [long] = backend.loglikelihood([TextRequest("The committee met on Tuesday and agreed on the plan. " * 30)], "base")
    assert long.tokens > 256  # scored in pieces
    assert -3.0 < long.logp / long.tokens < -0.01
    backend.close()
    for text, file in zip(texts, (None, lora), strict=True):
        with bare_llama(smollm2.gguf_path, file) as llama:
            assert text == text_of(llama, greedy(llama, tokens, GREEDY.max_new_tokens))


def test_cancel_during_prefill_frees_the_engine_within_a_second(smollm2):
    backend = open_llamacpp(smollm2.gguf_path, smollm2.template, None, 4096)
    assert seconds_to_cancel(backend, "word " * 3900) < 1.0
    backend.close()
