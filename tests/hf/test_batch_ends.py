"""A batch of two sides that one leaves, that is cancelled, or that fails: nothing of it is left."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf import Batch, Sampler, TransformersBackend, open_transformers
from biasdpo.backends.hf import BatchRow as Row
from biasdpo.errors import BackendError
from biasdpo.records import Side
from tests.hf.cases import LONG, PROMPTS, SHORT, Case, adapter_is_off, hooks_on, read, read_together, rows_computed

pytestmark = pytest.mark.usefixtures("sides_wait")


@cache
def canaries_of_bare_model(case: Case) -> list[NDArray[np.float32]]:
    bare = open_transformers(case.folder, case.template, None, 512, device="cpu")
    try:
        return [bare.canary_logits("base"), bare.canary_logits_in_one_batch()[0]]
    finally:
        bare.close()


def assert_nothing_is_left(case: Case, batched: TransformersBackend, hooks: list[list[int]]) -> None:
    """No hooks, no state: the proof passes again against a model that never had an adapter, and pairs are as before."""
    assert hooks_on(batched) == hooks
    assert adapter_is_off(batched)
    assert batched._pairing._waiting == []
    assert batched.prove(canaries_of_bare_model(case)) == batched.proof
    together = read_together(*(batched.stream(PROMPTS[0], SHORT, side) for side in ("base", "tuned")))
    assert together == [read(case.backend.stream(PROMPTS[0], SHORT, side)) for side in ("base", "tuned")]


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_cancel_in_the_middle_of_the_prompt_leaves_nothing(case: Case, batched: TransformersBackend, chunks: int) -> None:
    """Set while the first layer computes a chunk: no layer after it does."""
    cancellation = Cancellation()
    hooks = hooks_on(batched)
    computed: list[int] = []
    layers = batched._shared.model.model.layers

    def cancel(*_args: Any) -> None:
        computed.append(0)
        if len(computed) == (1 if chunks == 1 else len(layers) + 1):
            cancellation.set()

    handles = [layers[0].register_forward_hook(cancel)]
    handles += [layer.register_forward_hook(lambda *_, i=i: computed.append(i)) for i, layer in enumerate(layers) if i]
    streams = [batched.stream(LONG, SHORT, side, cancellation=cancellation) for side in ("base", "tuned")]
    try:
        assert read_together(*streams) == [([], "cancelled")] * 2
    finally:
        for handle in handles:
            handle.remove()
    assert computed == ([0] if chunks == 1 else [*range(len(layers)), 0])
    assert_nothing_is_left(case, batched, hooks)


def test_a_cancel_while_writing_leaves_nothing(case: Case, batched: TransformersBackend) -> None:
    cancellation = Cancellation()
    hooks = hooks_on(batched)
    steps: list[int] = []

    def cancel(*_args: Any) -> None:
        steps.append(1)
        if len(steps) == 6:
            cancellation.set()

    handle = batched._shared.model.model.layers[0].register_forward_hook(cancel)
    streams = [batched.stream(PROMPTS[0], SHORT, side, strength=0.7, cancellation=cancellation) for side in ("base", "tuned")]
    try:
        results = read_together(*streams)
    finally:
        handle.remove()
    assert [reason for _, reason in results] == ["cancelled", "cancelled"]
    assert all(len(pieces) <= 5 for pieces, _ in results)
    assert len(steps) == 6
    assert_nothing_is_left(case, batched, hooks)


@pytest.mark.parametrize("when", ["prompt", "writing"])
@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_cancel_of_one_side_leaves_the_other(case: Case, batched: TransformersBackend, cancelled: int, when: str) -> None:
    cancellations = [Cancellation(), Cancellation()]
    hooks = hooks_on(batched)
    steps: list[int] = []

    def cancel(*_args: Any) -> None:
        steps.append(1)
        if len(steps) == (1 if when == "prompt" else 6):
            cancellations[cancelled].set()

    handle = batched._shared.model.model.layers[0].register_forward_hook(cancel)
    sampling = replace(SHORT, max_new_tokens=20)
    sides = ("base", "tuned")
    streams = [batched.stream(LONG, sampling, side, cancellation=c) for side, c in zip(sides, cancellations, strict=True)]
    with rows_computed(batched) as rows:
        try:
            results = read_together(*streams)
        finally:
            handle.remove()
    assert results[cancelled][1] == "cancelled"
    assert results[1 - cancelled] == read(case.backend.stream(LONG, sampling, sides[1 - cancelled]))
    together = 1 if when == "prompt" else 6
    assert rows == [2] * together + [1] * (2 + 19 - together)  # two chunks, 19 tokens of 20 computed with
    assert_nothing_is_left(case, batched, hooks)


def test_a_reader_that_leaves_takes_its_row_along(case: Case, batched: TransformersBackend) -> None:
    hooks = hooks_on(batched)
    left = threading.Event()
    pieces: list[str] = []

    def read_on() -> None:
        stream = batched.stream(PROMPTS[0], SHORT, "tuned")
        pieces.append(next(stream))
        assert left.wait(60)
        pieces.extend(read(stream)[0])

    thread = threading.Thread(target=read_on)
    with rows_computed(batched) as rows:
        thread.start()
        stream = batched.stream(PROMPTS[0], SHORT, "base")
        for _ in range(3):
            next(stream)
        stream.close()
        left.set()
        thread.join()
    assert pieces == read(case.backend.stream(PROMPTS[0], SHORT, "tuned"))[0]
    assert rows[0] == 2
    assert rows[-1] == 1
    assert_nothing_is_left(case, batched, hooks)


def test_out_of_memory_is_one_line_on_both_sides(case: Case, batched: TransformersBackend) -> None:
    hooks = hooks_on(batched)
    steps: list[int] = []

    def fail(*_args: Any) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    handle = batched._shared.model.model.layers[1].register_forward_pre_hook(fail)
    try:
        results = read_together(*(batched.stream(PROMPTS[0], SHORT, side) for side in ("base", "tuned")))
    finally:
        handle.remove()
    assert [type(result) for result in results] == [BackendError, BackendError]
    assert all(str(result).startswith("Out of memory: ") and "\n" not in str(result) for result in results)
    assert_nothing_is_left(case, batched, hooks)


def test_logits_that_are_no_numbers_end_one_row() -> None:
    """Row 1's are NaN at the second step; row 0's greatest logit is at 2, 1, 0."""
    rows = [
        Row(side, x, Sampler(replace(SHORT, max_new_tokens=3), [7]), 3, Cancellation())
        for side, x in (("base", 0.0), ("tuned", 1.0))
    ]
    asked: list[list[list[int]]] = []

    def step(tokens: Any, _cache: Any, _rows: Any) -> torch.Tensor:
        asked.append(list(tokens))
        count = len(asked)
        logits = torch.zeros(len(tokens), 3)
        logits[0, 3 - count] = 1.0
        if count == 2:
            logits[1] = torch.nan
        return logits

    batch = Batch([7], rows, step, frozenset())
    assert [batch.next_token(rows[0]) for _ in range(3)] == [2, 1, 0]
    assert batch.next_token(rows[1]) == 0  # the first of equals
    with pytest.raises(BackendError, match="not numbers: lower the strength"):
        batch.next_token(rows[1])
    assert asked == [[[7], [7]], [[2], [0]], [[1]]]


def test_a_fault_of_ours_ends_both_rows_as_well() -> None:
    rows = [Row(side, 1.0, Sampler(SHORT, [7]), 3, Cancellation()) for side in ("base", "tuned")]

    def step(*_args: Any) -> None:
        raise ZeroDivisionError

    batch = Batch([7], rows, step, frozenset())
    with pytest.raises(ZeroDivisionError):
        batch.next_token(rows[0])
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        batch.next_token(rows[1])


def test_a_closed_model_ends_both_sides(case: Case) -> None:
    backend = open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=True)
    begun, closed = threading.Barrier(3), threading.Event()
    errors: list[str] = []

    def write(side: Side) -> None:
        stream = backend.stream(PROMPTS[0], SHORT, side)
        next(stream)
        begun.wait(60)
        assert closed.wait(60)
        with pytest.raises(BackendError) as caught:
            next(stream)
        errors.append(str(caught.value))

    threads = [threading.Thread(target=write, args=(side,)) for side in ("base", "tuned")]
    for thread in threads:
        thread.start()
    begun.wait(60)
    backend.close()
    closed.set()
    for thread in threads:
        thread.join()
    assert errors == ["The model was closed: choose it again"] * 2
