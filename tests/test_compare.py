"""stream_pair on a tiny random model: the queue, Stop, a reader that leaves, what goes wrong on one side."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from biasdpo import models
from biasdpo.backends.base import Cancellation, VisitorQueue
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.compare import Generation, Generations, Waiting, score_tokens, stream_pair
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, ConfigError, ModelError, PromptError
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec
from biasdpo.records import GenerationPair, LikelihoodRequest, PairTurn, Sampling
from tests import tiny_models

SAMPLING = Sampling(max_new_tokens=24, temperature=0.9, seed=5)
ENDLESS = Sampling(max_new_tokens=480, temperature=1.5, top_k=0, top_p=1.0)


@pytest.fixture(scope="module")
def engine(tiny_llama_gguf, tiny_llama_adapter, tmp_path_factory):
    adapter = AdapterSpec("tiny-lora", tiny_llama_adapter, "")
    lora = write.lora(adapter, tiny_llama_gguf, tmp_path_factory.mktemp("lora") / "lora.gguf")
    backend = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, lora, tiny_models.CONTEXT_LENGTH, threads=1)
    yield Engine(models.find(str(tiny_llama_gguf)), adapter, backend)
    backend.close()


def last(stream) -> GenerationPair:
    *_, pair = stream
    assert isinstance(pair, GenerationPair)
    return pair


def test_the_pair_grows_to_its_end_and_says_what_made_it(engine):
    pairs = list(stream_pair(engine, "Why?", SAMPLING))
    for before, after in pairwise(pairs):
        assert after.left.text.startswith(before.left.text)
        assert after.right.text.startswith(before.right.text)
    pair = pairs[-1]
    assert pair.finished
    assert (pair.adapter, pair.backend, pair.strength, pair.sampling) == ("tiny-lora", "llamacpp", 1.0, SAMPLING)
    assert pair.left.tokens <= 24
    assert pair.left.seconds_to_first_token > 0
    row = pair.to_json()
    assert {"prompt", "model", "adapter", "backend", "seed", "strength", "base", "tuned", "canary_kl_nats"} <= set(row)
    assert (
        {"text", "tokens", "finish_reason", "seconds_to_first_token", "tokens_per_second"}
        == set(row["base"])
        == set(row["tuned"])
    )


def test_the_same_seed_gives_the_same_pair_and_seed_0_is_a_seed(engine):
    def texts(seed: int) -> tuple[str, str]:
        pair = last(stream_pair(engine, "Why?", Sampling(max_new_tokens=24, temperature=1.2, seed=seed)))
        return pair.left.text, pair.right.text

    assert texts(0) == texts(0) != texts(1)


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_an_empty_prompt(engine, prompt):
    with pytest.raises(PromptError, match="prompt is empty"):
        last(stream_pair(engine, prompt, SAMPLING))


def test_a_prompt_that_does_not_fit_frees_the_engine(engine):
    with pytest.raises(PromptError, match=r"the context holds 512|context of 512|512"):
        last(stream_pair(engine, "long " * 600, SAMPLING))
    assert last(stream_pair(engine, "Why?", SAMPLING)).finished


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_a_strength_out_of_range(engine, strength):
    with pytest.raises(ConfigError, match="strength must be a number from 0"):
        last(stream_pair(engine, "Why?", SAMPLING, strength=strength))


def test_stop_ends_both_sides_and_keeps_what_was_written(engine):
    cancellation = Cancellation()
    pair = None
    for pair in stream_pair(engine, "Why?", ENDLESS, cancellation=cancellation):
        if pair.left.tokens >= 3:
            cancellation.set()
    assert pair.finished
    assert "cancelled" in {pair.left.finish_reason, pair.right.finish_reason}
    assert pair.left.tokens < 480


def test_visitors_wait_in_turn_and_see_how_many_are_ahead(engine):
    alone = last(stream_pair(engine, "Who?", SAMPLING))
    first = stream_pair(engine, "Why?", ENDLESS)
    next(first)  # has its turn
    places: list[int] = []
    texts: list[str] = []
    waited = threading.Event()

    def second() -> None:
        for event in stream_pair(engine, "Who?", SAMPLING):
            if isinstance(event, Waiting):
                places.append(event.ahead)
                waited.set()
            else:
                texts.append(event.left.text)

    thread = threading.Thread(target=second)
    thread.start()
    assert waited.wait(10)
    assert not texts
    first.close()  # the first visitor's tab is closed
    thread.join(10)
    assert set(places) == {1}
    assert texts[-1] == alone.left.text


def test_stop_while_waiting_leaves_the_queue(engine):
    first = stream_pair(engine, "Why?", ENDLESS)
    next(first)
    cancellation = Cancellation()
    events = stream_pair(engine, "Who?", SAMPLING, cancellation=cancellation)
    assert next(events) == Waiting(1)
    cancellation.set()
    pair = last(events)
    assert (pair.left.finish_reason, pair.right.finish_reason) == ("cancelled", "cancelled")
    assert pair.left.tokens == 0
    first.close()
    assert last(stream_pair(engine, "Why?", SAMPLING)).finished


def test_a_failure_on_one_side_is_raised_once_and_stops_the_other(engine, monkeypatch):
    tuned = engine.backend._contexts["tuned"]
    decode = tuned.decode

    def failing(tokens, position, **options):
        if position > 40:
            raise BackendError("llama.cpp failed")
        return decode(tokens, position, **options)

    monkeypatch.setattr(tuned, "decode", failing)
    with pytest.raises(BackendError, match=r"llama\.cpp failed"):
        last(stream_pair(engine, "Why?", ENDLESS))
    monkeypatch.undo()
    assert last(stream_pair(engine, "Why?", SAMPLING)).finished
    assert not [t for t in threading.enumerate() if t.name.startswith("stream ")]


def test_the_queue_is_first_come_first_served():
    visitors = VisitorQueue()
    with visitors.ticket() as first, visitors.ticket() as second:
        with visitors.ticket() as third:
            assert [visitors.position(t) for t in (first, second, third)] == [0, 1, 2]
        assert visitors.position(second, 0.01) == 1
    assert visitors._tickets == []


# The pool of engines


def test_the_pool_shares_an_engine_and_closes_the_least_recently_used(tiny_llama_gguf, tiny_phi_gguf, workspace):
    pool = EnginePool(workspace, capacity=1)
    llama, phi = EngineKey(str(tiny_llama_gguf), "none"), EngineKey(str(tiny_phi_gguf), "none")
    with pool.lease(llama) as one, pool.lease(llama) as other:
        assert one is other
        assert last(stream_pair(one, "Why?", SAMPLING)).right is None  # base-only
    with pool.lease(phi) as third:
        assert last(stream_pair(third, "Why?", SAMPLING)).finished
        assert pool.state(llama) is None
        with pytest.raises(BackendError, match="closed"):
            last(stream_pair(one, "Why?", SAMPLING))
    pool.close()
    assert pool.opened() == []


def test_idle_engines_are_released_at_a_request_from_any_thread(tiny_llama_gguf, tiny_phi_gguf, workspace):
    pool = EnginePool(workspace)
    llama, phi = EngineKey(str(tiny_llama_gguf), "none"), EngineKey(str(tiny_phi_gguf), "none")
    released: list[list[str]] = []

    def ask() -> None:
        thread = threading.Thread(target=lambda: released.append(pool.release_idle()))
        thread.start()
        thread.join(10)

    with pool.lease(llama):
        pass
    with pool.lease(phi) as engine:
        assert pool.release("gpu") is True  # both are on the CPU
        ask()
        assert last(stream_pair(engine, "Why?", SAMPLING)).finished  # one in use stays
    ask()
    ask()
    assert released == [[tiny_llama_gguf.name], [tiny_phi_gguf.name], []]
    with pool.lease(llama) as engine:  # loaded again
        assert last(stream_pair(engine, "Why?", SAMPLING)).finished
    pool.close()


def test_a_failed_load_raises_for_everyone_and_is_retried(workspace, tmp_path, tiny_llama_gguf):
    pool = EnginePool(workspace)
    file = tmp_path / "late.gguf"
    key = EngineKey(str(file), "none")
    with pytest.raises(ModelError), pool.lease(key):
        pass
    file.write_bytes(tiny_llama_gguf.read_bytes())
    pool.load(key)
    with pool.lease(key) as engine:
        assert engine.adapter is None
    pool.close()


def test_each_side_continues_its_own_conversation(engine):
    first = last(stream_pair(engine, "Why?", SAMPLING))
    second = last(stream_pair(engine, "And then?", SAMPLING, history=first.continued()))
    assert second.history == (PairTurn("Why?", first.left.text, first.right.text),)
    for side, own in (("base", second.left), ("tuned", second.right)):
        stream = engine.backend.stream("And then?", SAMPLING, side, history=[("Why?", getattr(second.history[0], side))])
        assert "".join(stream) == own.text
    alone = last(stream_pair(engine, "And then?", SAMPLING))
    assert (alone.left.text, alone.right.text) != (second.left.text, second.right.text)
    assert second.to_json()["history"][0]["base"] == first.left.text


def test_token_scores_add_up_to_the_likelihood_of_both_sides(engine):
    first = last(stream_pair(engine, "Why?", SAMPLING))
    pair = last(stream_pair(engine, "日本語 😀?", SAMPLING, history=first.continued(), strength=0.5))
    for side, completion in (("base", pair.left), ("tuned", pair.right)):
        scores = score_tokens(engine, pair, side)
        assert "".join(score.text for score in scores) == completion.text
        request = LikelihoodRequest(pair.prompt, completion.text, history=pair.history_of(side))
        for name, strength in (("base", 1.0), ("tuned", 0.5)):
            [whole] = engine.backend.loglikelihood([request], name, strength=strength)
            assert sum(getattr(score, name) for score in scores) == pytest.approx(whole.logp, abs=0.02)


# A visitor's generation


def test_a_visitor_has_one_generation_and_leaves_nothing_behind():
    visitors = Generations()
    first, other = visitors.begin("a"), visitors.begin("b")
    second = visitors.begin("a")
    assert (first.superseded.is_set(), first.cancellation.is_set()) == (True, True)
    assert not other.cancellation.is_set()
    visitors.end("a", first)  # late: the place is the second one's
    visitors.stop("a")
    assert (second.stopped, second.superseded.is_set(), second.cancellation.is_set()) == (True, False, True)
    visitors.end("a", second)
    visitors.drop("b")
    visitors.stop("nobody")
    assert len(visitors) == 0


def test_a_reader_that_never_comes_back_does_not_keep_the_engine(engine, workspace, monkeypatch):
    monkeypatch.setattr("biasdpo.engines.open_engine", lambda *_: engine)
    pool, key, visitors = EnginePool(workspace), EngineKey("tiny"), Generations()
    abandoned = visitors.begin("a")
    abandoned.start(pool, key, "Why?", ENDLESS)
    assert next(event for event in abandoned.events(pool, key) if isinstance(event, GenerationPair))  # and never reads on
    waiting = visitors.begin("b")
    waiting.start(pool, key, "Who?", SAMPLING)
    visitors.drop("a")  # the page was closed
    *_, pair = waiting.events(pool, key)
    assert pair.finished


def test_an_engines_error_is_raised_and_a_stop_while_loading_is_none(workspace, monkeypatch):
    loading = threading.Event()

    def fail(*_args: object) -> Engine:
        loading.wait(10)
        raise ConfigError("no such thing: choose another")

    monkeypatch.setattr("biasdpo.engines.open_engine", fail)
    pool, key, visitors = EnginePool(workspace), EngineKey("smollm2"), Generations()
    generation = visitors.begin("a")
    generation.start(pool, key, "Hello", SAMPLING)
    events = generation.events(pool, key)
    assert isinstance(next(events), Loading)
    visitors.stop("a")
    assert all(isinstance(event, Loading) for event in events)
    generation = Generation()
    generation.start(pool, key, "Hello", SAMPLING)
    loading.set()
    with pytest.raises(ConfigError, match="no such thing"):
        list(generation.events(pool, key))
