"""Order, concurrency, changes of strength and cancels change no text of the transformers backend."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest

from biasdpo import models
from biasdpo.backends.base import Cancellation
from biasdpo.compare import stream_pair
from biasdpo.engines import Engine
from biasdpo.records import FinishReason, GenerationPair, Sampling, Side
from tests.hf.cases import GREEDY, PROMPTS, WARM, Case, adapter_is_off, hooks_of, read, text_of

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
    layers = case.backend._shared.model.model.layers
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
