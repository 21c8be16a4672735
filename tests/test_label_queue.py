"""Pairs generated ahead, on a tiny random model: spare time, annotators who wait, recipes that change or fail."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from biasdpo import labeling, models
from biasdpo.backends.base import Cancellation, VisitorQueue
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.compare import Prefetch, Waiting, stream_pair, stream_samples
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, ConfigError, DatasetError, PromptError
from biasdpo.gguf import write
from biasdpo.labeling import AHEAD, BlindPair, PairQueue, Recipe, complete_sentences
from biasdpo.models import AdapterSpec
from biasdpo.prompts import Prompt
from biasdpo.records import GenerationPair, Sampling
from tests import tiny_models

SAMPLING = Sampling(max_new_tokens=12, temperature=1.2)
ENDLESS = Sampling(max_new_tokens=400, temperature=1.5, top_k=0, top_p=1.0)
PROMPTS = (Prompt("Why?", "gender", "women"), Prompt("Who?", "race"), Prompt("How?", "race"))
KEY = EngineKey("tiny")


@pytest.fixture(scope="module")
def engine(tiny_llama_gguf, tiny_llama_adapter, tmp_path_factory):
    adapter = AdapterSpec("tiny-lora", tiny_llama_adapter, "")
    lora = write.lora(adapter, tiny_llama_gguf, tmp_path_factory.mktemp("lora") / "lora.gguf")
    backend = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, lora, tiny_models.CONTEXT_LENGTH, threads=1)
    yield Engine(models.find(str(tiny_llama_gguf)), adapter, backend)
    backend.close()


@pytest.fixture
def pool(engine, workspace):
    pool = EnginePool(workspace)
    pool._engines[KEY] = Loading(share=1.0, engine=engine)  # opened once for all tests
    return pool


@pytest.fixture
def new_queue(pool, monkeypatch):
    monkeypatch.setattr(labeling, "complete_sentences", lambda text: text)  # the tiny model writes none
    made = []

    def make(counts: dict[tuple[str, str], int] | None = None) -> PairQueue:
        made.append(PairQueue(pool, random.Random(3), lambda: counts or {}))
        return made[-1]

    yield make
    for queue in made:
        queue.pause()


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "still not so"
        time.sleep(0.005)
    return value


def take(queue: PairQueue) -> BlindPair:
    pair = wait_until(lambda: queue.take() or queue.error)
    if isinstance(pair, Exception):
        raise pair
    return pair


def last(stream) -> GenerationPair:
    *_, pair = stream
    return pair


# The queue of visitors, without an engine


def test_visitors_go_before_spare_work_and_stop_it_unless_it_was_promoted():
    queue, working, waiting = VisitorQueue(), Cancellation(), Cancellation()
    with queue.ticket(working) as spare, queue.ticket(waiting) as spare_too:
        assert [queue.position(t) for t in (spare, spare_too)] == [0, 1]
        with queue.ticket() as visitor:
            assert [queue.position(t) for t in (spare, visitor, spare_too)] == [0, 1, 2]
            assert (working.is_set(), waiting.is_set()) == (True, False)  # only what has begun is to stop
            queue.promote(spare_too)
            with queue.ticket() as second:
                assert [queue.position(t) for t in (spare_too, second)] == [2, 3]
                assert not waiting.is_set()
    queue.promote(spare_too)  # it has left: nothing happens


# Streams


def test_two_samples_of_one_side_come_from_two_seeds_and_equal_streams_of_their_own(engine):
    pair = last(stream_samples(engine, "Why?", SAMPLING, "base"))
    assert (pair.left.side, pair.right.side) == ("base", "base")
    assert pair.left.text != pair.right.text

    def alone(seed: int) -> str:
        sampling = Sampling(max_new_tokens=12, temperature=1.2, seed=seed)
        return "".join(engine.backend.stream("Why?", sampling, "base"))

    assert (pair.left.text, pair.right.text) == (alone(0), alone(1))
    for source in ("base_base", "tuned_tuned"):
        with pytest.raises(ConfigError, match="temperature above 0"):
            Recipe(PROMPTS, source, KEY, Sampling(temperature=0.0))
    with pytest.raises(ConfigError, match="temperature above 0"):
        last(stream_samples(engine, "Why?", Sampling(temperature=0.0), "base"))


def test_spare_time_stops_for_a_visitor_and_the_visitors_text_is_as_alone(engine):
    alone = last(stream_pair(engine, "Why?", SAMPLING))
    seeds = (replace(ENDLESS, seed=seed) for seed in range(50))
    endless = next(one for one in seeds if last(stream_pair(engine, "Who?", one)).left.finish_reason == "limit")
    spare = stream_pair(engine, "Who?", endless, cancellation=Cancellation(), prefetch=Prefetch())
    pair = next(spare)
    events: list[object] = []
    visitor = threading.Thread(target=lambda: events.extend(stream_pair(engine, "Why?", SAMPLING)))
    visitor.start()
    for pair in spare:  # noqa: B007
        pass
    visitor.join(60)
    assert pair.left.finish_reason == "cancelled"
    assert pair.left.tokens < 400
    final = events[-1]
    assert (final.left.text, final.right.text) == (alone.left.text, alone.right.text)


def test_spare_time_that_is_wanted_runs_to_its_end(engine):
    spare = Prefetch()
    spare.promote()
    sampling = Sampling(max_new_tokens=60, temperature=1.5, top_k=0, top_p=1.0)
    stream = stream_pair(engine, "Who?", sampling, cancellation=Cancellation(), prefetch=spare)
    next(stream)
    with engine.backend.queue.ticket():
        assert last(stream).left.finish_reason != "cancelled"


# The queue


def test_pairs_come_ahead_of_time_and_no_more_than_that(new_queue):
    queue = new_queue()
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, SAMPLING))
    wait_until(lambda: queue._worker is None)  # no thread is left if there is nothing to do
    assert len(queue._ready) == AHEAD
    started = time.monotonic()
    pair = queue.take()
    assert time.monotonic() - started < 0.05
    assert {pair.left_side, pair.right_side} == {"base", "tuned"}
    wait_until(lambda: len(queue._ready) == AHEAD)
    queue.start(Recipe((Prompt("Other?"),), "base_base", KEY, SAMPLING))  # drops what was made by another recipe
    pairs = [take(queue) for _ in range(3)]
    assert {pair.prompt.text for pair in pairs} == {"Other?"}
    assert {pair.left_side for pair in pairs} <= {"base 1", "base 2"}
    assert len({pair.seed for pair in pairs}) == 3


def test_the_least_covered_cell_comes_first_and_every_prompt_once(new_queue):
    queue = new_queue({("gender", "women"): 5})
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, SAMPLING))
    shown = [take(queue).prompt.text for _ in range(6)]
    assert sorted(shown[:2]) == ["How?", "Who?"]
    assert Counter(shown[:3]) == Counter({"Why?": 1, "Who?": 1, "How?": 1}) == Counter(shown[3:])


def test_a_visitor_goes_before_what_is_made_ahead(new_queue, engine):
    queue = new_queue()
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, ENDLESS))
    wait_until(lambda: isinstance(queue.latest, GenerationPair))
    events = list(stream_pair(engine, "Why?", SAMPLING))
    assert events[-1].left.finish_reason != "cancelled"
    assert sum(isinstance(event, Waiting) for event in events) <= 2  # it stops within a token, not after 400
    assert take(queue).prompt in PROMPTS  # and what gave way is made after all


def test_a_pause_stops_generating_and_the_next_take_resumes(new_queue):
    queue = new_queue()
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, ENDLESS))
    wait_until(lambda: isinstance(queue.latest, GenerationPair))
    queue.pause()
    wait_until(lambda: queue._worker is None)
    assert queue.latest is None
    assert take(queue).prompt in PROMPTS


def test_greedy_prompts_are_asked_once(new_queue):
    queue = new_queue()
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, Sampling(max_new_tokens=8, temperature=0.0)))
    assert sorted(take(queue).prompt.text for _ in PROMPTS) == ["How?", "Who?", "Why?"]
    wait_until(lambda: queue.exhausted)
    assert queue.take() is None
    assert not queue.has_more


def test_an_error_ends_the_queue_until_it_is_started_again(new_queue, monkeypatch, caplog):
    queue = new_queue()
    with monkeypatch.context() as patch:
        patch.setattr(queue, "_draw", lambda *_: 1 / 0)
        queue.start(Recipe(PROMPTS, "base_tuned", KEY, SAMPLING))
        with pytest.raises(BackendError, match=r"The app failed \(ZeroDivisionError: division by zero\): start again"):
            take(queue)
    assert "ZeroDivisionError" in caplog.text
    queue.start(Recipe((Prompt("long " * 600),), "base_tuned", KEY, SAMPLING))
    with pytest.raises(PromptError, match="512"):
        take(queue)
    queue.start(Recipe((Prompt("long " * 600), PROMPTS[0]), "base_tuned", KEY, SAMPLING))  # one that is too long is skipped
    assert [take(queue).prompt.text for _ in range(4)] == ["Why?"] * 4
    monkeypatch.setattr(labeling, "complete_sentences", complete_sentences)
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, SAMPLING))
    with pytest.raises(DatasetError, match=r"The token limit \(12\) cut an answer off"):
        take(queue)
    monkeypatch.setattr(labeling, "complete_sentences", lambda text: text)
    same = Sampling(max_new_tokens=8, temperature=0.0)
    queue.start(Recipe(PROMPTS, "base_tuned", KEY, same, strength=0.0))
    with pytest.raises(DatasetError, match="same text"):
        take(queue)
    assert queue.skipped == len(PROMPTS)
