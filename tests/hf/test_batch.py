"""Both sides of a pair in one batch: each writes what it writes alone; nothing is left of a batch that is cancelled or fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from biasdpo import models
from biasdpo.backends import hf
from biasdpo.backends.base import Cancellation
from biasdpo.backends.hf import Batch, BatchRow, Pairing, Sampler, TransformersBackend, open_transformers
from biasdpo.backends.hf_loading import encode_prompt
from biasdpo.compare import stream_pair, stream_samples
from biasdpo.engines import Engine
from biasdpo.errors import BackendError, ProofError
from biasdpo.records import GenerationPair, Sampling, Side
from tests.hf.cases import LONG, PROMPTS, SHORT, WARM, Case, adapter_is_off, hooks_on, read, read_together, rows_computed, text_of

pytestmark = pytest.mark.usefixtures("sides_wait")
SIDES: tuple[Side, Side] = ("base", "tuned")


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch, sides_wait: None) -> None:  # noqa: ARG001 - it comes after
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 0.0)


def both(backend: TransformersBackend, prompt: str, *samplings: Sampling, **options: Any) -> list[Any]:
    """A stream of each side, read by a thread each."""
    return read_together(
        *(backend.stream(prompt, samplings[i % len(samplings)], side, **options) for i, side in enumerate(SIDES))
    )


def alone(case: Case, prompt: str, *samplings: Sampling, **options: Any) -> list[Any]:
    """The same, one after the other, never in a batch."""
    return [read(case.backend.stream(prompt, samplings[i % len(samplings)], side, **options)) for i, side in enumerate(SIDES)]


# The same text


@pytest.mark.parametrize("sampling", [SHORT, WARM], ids=["greedy", "sampled"])
def test_a_pair_writes_what_each_side_writes_alone(case: Case, batched: TransformersBackend, sampling: Sampling) -> None:
    for prompt, strength in [*zip(PROMPTS, (1.0, 0.3, 1.5), strict=True), (PROMPTS[0], 0.0)]:
        expected = alone(case, prompt, sampling, strength=strength)
        with rows_computed(batched) as rows:
            assert both(batched, prompt, sampling, strength=strength) == expected
        assert (expected[0] != expected[1]) == (strength > 0)
        # The last token drawn of n is not computed with: n steps (the prompt's is one) have both rows while both sides write.
        shorter, longer = sorted(len(pieces) for pieces, _ in expected)
        assert rows == [2] * shorter + [1] * (longer - shorter)


def test_a_long_prompt_is_computed_in_chunks(case: Case, batched: TransformersBackend) -> None:
    assert 256 < len(encode_prompt(batched._tokenizer, case.template, LONG)) <= 512 - 20
    sampling = replace(SHORT, max_new_tokens=5)
    with rows_computed(batched) as rows:
        assert both(batched, LONG, sampling) == alone(case, LONG, sampling)
    assert rows == [2] * (2 + 4)  # two chunks; four tokens of five are computed with


def test_the_end_of_text_ends_one_side(case: Case, batched: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base side's fourth token is made an end of text."""
    drawn: list[int] = []
    take = BatchRow.take

    def note(row: BatchRow, logits: Any, ends: frozenset[int]) -> None:
        take(row, logits, ends)
        drawn.append(row.last)

    with monkeypatch.context() as patch:
        patch.setattr(BatchRow, "take", note)
        read(case.backend.stream(PROMPTS[0], SHORT, "base"))
    for backend in (case.backend, batched):
        monkeypatch.setattr(backend, "_ends", frozenset(drawn[3:4]))
    with rows_computed(batched) as rows:
        base, tuned = both(batched, PROMPTS[0], SHORT)
    assert [base, tuned] == alone(case, PROMPTS[0], SHORT)
    assert base[1] == "end_of_text"
    assert len(base[0]) == drawn.index(drawn[3]) + 1
    assert set(rows) == {1, 2}


@pytest.mark.parametrize("leaves", [False, True])
def test_nobody_waits_for_a_slow_reader_or_one_that_leaves(case: Case, batched: TransformersBackend, leaves: bool) -> None:
    """Base is read to its end, or left, before tuned's second token is read: both were computed in one batch all the same."""
    hooks = hooks_on(batched)
    base_is_done = threading.Event()
    tuned_pieces: list[str] = []

    def read_slowly() -> None:
        stream = batched.stream(PROMPTS[0], SHORT, "tuned")
        tuned_pieces.append(next(stream))
        assert base_is_done.wait(60)
        tuned_pieces.extend(read(stream)[0])

    thread = threading.Thread(target=read_slowly)
    base, tuned = alone(case, PROMPTS[0], SHORT)
    with rows_computed(batched) as rows:
        thread.start()
        stream = batched.stream(PROMPTS[0], SHORT, "base")
        if leaves:
            assert [next(stream) for _ in range(3)] == base[0][:3]
            stream.close()
        else:
            assert read(stream) == base
        base_is_done.set()
        thread.join()
    assert tuned_pieces == tuned[0]
    assert rows[0] == 2
    assert rows.count(2) == 3 if leaves else rows.count(2) >= min(len(base[0]), len(tuned[0]))
    assert_nothing_is_left(case, batched, hooks)


# Who is paired with whom


def test_a_pair_of_compare_is_one_batch_and_two_samples_are_not(
    case: Case, batched: TransformersBackend, smollm2: models.ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(smollm2, models.AdapterSpec("random", case.adapter, ""), batched)
    with rows_computed(batched) as rows:
        pair = list(stream_pair(engine, PROMPTS[0], WARM, strength=1.5))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "base", WARM)
    assert pair.right.text == text_of(case.backend, PROMPTS[0], "tuned", WARM, 1.5)
    assert rows[0] == 2
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 0.0)
    with rows_computed(batched) as rows:
        pair = list(stream_samples(engine, PROMPTS[0], WARM, "tuned"))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "tuned", WARM)
    assert set(rows) == {1}


@pytest.mark.usefixtures("nobody_waits")
def test_a_side_whose_other_never_comes_goes_alone(case: Case, batched: TransformersBackend) -> None:
    assert batched.batches_sides
    assert case.backend.batches_sides == (not case.backend.device.startswith("CPU"))  # unless asked for
    with rows_computed(batched) as rows:
        results = read_together(batched.stream(PROMPTS[0], SHORT, "base"), batched.stream(PROMPTS[1], SHORT, "tuned"))
    assert results == [alone(case, PROMPTS[0], SHORT)[0], alone(case, PROMPTS[1], SHORT)[1]]
    assert set(rows) == {1}
    assert batched._pairing._waiting == []


def test_without_an_adapter_nobody_is_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairing, "batch_of", lambda *_args: pytest.fail("waited"))
    backend = open_transformers(case.folder, case.template, None, 512, device="cpu", batch_sides=True)
    assert text_of(backend, PROMPTS[0], "base") == text_of(case.backend, PROMPTS[0], "base")
    backend.close()


def test_many_pairs_at_a_time_do_not_mix(case: Case, batched: TransformersBackend) -> None:
    """Three pairs of one prompt and one of another, each tuned side at a strength of its own: eight threads."""
    wanted = [(prompt, side, x) for prompt, x in ((0, 1.0), (0, 0.3), (0, 1.5), (1, 1.0)) for side in SIDES]
    streams = [batched.stream(PROMPTS[prompt], SHORT, side, strength=x) for prompt, side, x in wanted]
    expected = [read(case.backend.stream(PROMPTS[prompt], SHORT, side, strength=x)) for prompt, side, x in wanted]
    with rows_computed(batched) as rows:
        assert read_together(*streams) == expected
    assert rows[:1] == [2]


# The proof


def test_the_proof_is_of_the_batch(case: Case, batched: TransformersBackend) -> None:
    assert batched.proof.base_max_difference == batched.proof.noise == 0.0
    assert batched.proof.kl_nats == pytest.approx(case.backend.proof.kl_nats, rel=1e-3)
    base, tuned = batched.canary_logits_in_one_batch()
    assert np.allclose(base, case.backend.canary_logits("base"), atol=1e-3)
    assert np.allclose(tuned, case.backend.canary_logits("tuned"), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (["default", "default"], "The base side is not the base model"),
        (["default", "__base__"], "The base side is not the base model"),
        (["__base__", "__base__"], "The adapter changes nothing"),
    ],
)
def test_the_proof_fails_on_a_batch_that_mixes_up_its_rows(
    case: Case, monkeypatch: pytest.MonkeyPatch, rows: list[str], match: str
) -> None:
    """Each side alone is right: a proof of that alone would pass."""
    call = hf._RowHook.__call__

    def mix_up(hook: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return call(hook, layer, args, kwargs) and (args, kwargs | {"adapter_names": rows})

    monkeypatch.setattr(hf._RowHook, "__call__", mix_up)
    with pytest.raises(ProofError, match=match):
        open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=True)
    open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=False).close()


# Cancels and failures


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
    assert both(batched, PROMPTS[0], SHORT) == alone(case, PROMPTS[0], SHORT)


@contextmanager
def at_step(batched: TransformersBackend, number: int, action: Callable[[], None]) -> Iterator[list[int]]:
    """Call `action` after layer 0 computed step `number`; yields the layers that computed."""
    computed: list[int] = []

    def note(i: int) -> None:
        computed.append(i)
        if i == 0 and computed.count(0) == number:
            action()

    layers = batched._shared.model.model.layers
    handles = [layer.register_forward_hook(lambda *_, i=i: note(i)) for i, layer in enumerate(layers)]
    try:
        yield computed
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("prompt", "step"), [(LONG, 1), (LONG, 2), (PROMPTS[0], 6)])
def test_a_cancel_leaves_nothing(case: Case, batched: TransformersBackend, prompt: str, step: int) -> None:
    """Set while the first layer computes a chunk of the prompt, or a token: no layer after it does."""
    cancellation, hooks = Cancellation(), hooks_on(batched)
    with at_step(batched, step, cancellation.set) as computed:
        results = both(batched, prompt, SHORT, strength=0.7, cancellation=cancellation)
    assert [reason for _, reason in results] == ["cancelled", "cancelled"]
    assert all(len(pieces) <= (5 if step == 6 else 0) for pieces, _ in results)
    assert computed == [*range(len(batched._shared.model.model.layers))] * (step - 1) + [0]
    assert_nothing_is_left(case, batched, hooks)


@pytest.mark.parametrize("step", [1, 6])
@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_cancel_of_one_side_leaves_the_other(case: Case, batched: TransformersBackend, cancelled: int, step: int) -> None:
    cancellations, hooks = [Cancellation(), Cancellation()], hooks_on(batched)
    streams = [batched.stream(LONG, SHORT, side, cancellation=c) for side, c in zip(SIDES, cancellations, strict=True)]
    with rows_computed(batched) as rows, at_step(batched, step, cancellations[cancelled].set):
        results = read_together(*streams)
    assert results[cancelled][1] == "cancelled"
    assert results[1 - cancelled] == alone(case, LONG, SHORT)[1 - cancelled]
    assert rows == [2] * step + [1] * (2 + 15 - step)  # two chunks, 15 tokens of 16 are computed with
    assert_nothing_is_left(case, batched, hooks)


def test_out_of_memory_is_one_line_on_both_sides(case: Case, batched: TransformersBackend) -> None:
    hooks = hooks_on(batched)

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

    with at_step(batched, 4, fail):
        results = both(batched, PROMPTS[0], SHORT)
    assert [type(result) for result in results] == [BackendError, BackendError]
    assert all(str(result).startswith("Out of memory: ") and "\n" not in str(result) for result in results)
    assert_nothing_is_left(case, batched, hooks)


def test_logits_that_are_no_numbers_end_one_row() -> None:
    """Row 1's are NaN at the second step; row 0's greatest logit is at 2, 1, 0."""
    short = replace(SHORT, max_new_tokens=3)
    rows = [BatchRow(side, x, Sampler(short, [7]), 3, Cancellation()) for side, x in zip(SIDES, (0.0, 1.0), strict=True)]
    asked: list[list[list[int]]] = []

    def step(tokens: Any, _cache: Any, _rows: Any) -> torch.Tensor:
        asked.append(list(tokens))
        logits = torch.zeros(len(tokens), 3)
        logits[0, 3 - len(asked)] = 1.0
        if len(asked) == 2:
            logits[1] = torch.nan
        return logits

    batch = Batch([7], rows, step, frozenset())
    assert [batch.next_token(rows[0]) for _ in range(3)] == [2, 1, 0]
    assert batch.next_token(rows[1]) == 0  # the first of equals
    with pytest.raises(BackendError, match="not numbers: lower the strength"):
        batch.next_token(rows[1])
    assert asked == [[[7], [7]], [[2], [0]], [[1]]]


def test_a_fault_of_ours_ends_both_rows_as_well() -> None:
    rows = [BatchRow(side, 1.0, Sampler(SHORT, [7]), 3, Cancellation()) for side in SIDES]

    def step(*_args: Any) -> None:
        raise ZeroDivisionError

    batch = Batch([7], rows, step, frozenset())
    with pytest.raises(ZeroDivisionError):
        batch.next_token(rows[0])
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        batch.next_token(rows[1])
