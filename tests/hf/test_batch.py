"""Both sides of a pair in one batch: what each writes is what it writes alone, whatever becomes of the other."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from biasdpo import models
from biasdpo.backends import hf
from biasdpo.backends.hf import BatchRow as Row
from biasdpo.backends.hf import Pairing, TransformersBackend, open_transformers
from biasdpo.backends.hf_loading import encode_prompt
from biasdpo.compare import stream_pair, stream_samples
from biasdpo.engines import Engine
from biasdpo.errors import ProofError
from biasdpo.records import GenerationPair, Sampling
from tests.hf.cases import LONG, PROMPTS, SHORT, WARM, Case, read, read_together, rows_computed, text_of

pytestmark = pytest.mark.usefixtures("sides_wait")


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch, sides_wait: None) -> None:  # noqa: ARG001 - it comes after
    monkeypatch.setattr(hf, "PAIRING_SECONDS", 0.0)


# The same text


@pytest.mark.parametrize("sampling", [SHORT, WARM], ids=["greedy", "sampled"])
def test_a_pair_writes_what_each_side_writes_alone(case: Case, batched: TransformersBackend, sampling: Sampling) -> None:
    for prompt, strength in zip(PROMPTS, (1.0, 0.3, 1.5), strict=True):
        alone = [read(case.backend.stream(prompt, sampling, side, strength=strength)) for side in ("base", "tuned")]
        with rows_computed(batched) as rows:
            together = read_together(*(batched.stream(prompt, sampling, side, strength=strength) for side in ("base", "tuned")))
        assert together == alone
        assert alone[0] != alone[1]
        # The last token drawn of n is not computed with: n steps (the prompt's is one) have both rows while both sides write.
        shorter, longer = sorted(len(pieces) for pieces, _ in alone)
        assert rows == [2] * shorter + [1] * (longer - shorter)


def test_strength_0_is_base_in_a_batch_too(case: Case, batched: TransformersBackend) -> None:
    base, tuned = read_together(*(batched.stream(PROMPTS[0], SHORT, side, strength=0.0) for side in ("base", "tuned")))
    assert base == tuned == read(case.backend.stream(PROMPTS[0], SHORT, "base"))


def test_a_long_prompt_is_computed_in_chunks(case: Case, batched: TransformersBackend) -> None:
    assert 256 < len(encode_prompt(batched._tokenizer, case.template, LONG)) <= 512 - 20
    sampling = replace(SHORT, max_new_tokens=5)
    with rows_computed(batched) as rows:
        together = read_together(*(batched.stream(LONG, sampling, side) for side in ("tuned", "base")))
    assert together == [read(case.backend.stream(LONG, sampling, side)) for side in ("tuned", "base")]
    assert rows == [2] * (2 + 4)  # two chunks; four tokens of five are computed with


@pytest.mark.parametrize("shorter", ["base", "tuned"])
def test_when_one_side_ends_the_other_goes_on(case: Case, batched: TransformersBackend, shorter: str) -> None:
    samplings = [replace(SHORT, max_new_tokens=5 if side == shorter else 30) for side in ("base", "tuned")]
    streams = [batched.stream(PROMPTS[0], sampling, side) for sampling, side in zip(samplings, ("base", "tuned"), strict=True)]
    with rows_computed(batched) as rows:
        together = read_together(*streams)
    alone = [
        read(case.backend.stream(PROMPTS[0], sampling, side)) for sampling, side in zip(samplings, ("base", "tuned"), strict=True)
    ]
    assert together == alone
    longer = max(len(pieces) for pieces, _ in alone)
    assert longer > 5
    assert rows == [2] * 5 + [1] * (longer - 5)


def test_the_end_of_text_ends_one_side(case: Case, batched: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base side's fourth token is made an end of text."""
    drawn: list[int] = []
    take = Row.take

    def note(row: Row, logits: Any, ends: frozenset[int]) -> None:
        take(row, logits, ends)
        drawn.append(row.last)

    with monkeypatch.context() as patch:
        patch.setattr(Row, "take", note)
        read(case.backend.stream(PROMPTS[0], SHORT, "base"))
    ends = frozenset(drawn[3:4])
    monkeypatch.setattr(case.backend, "_ends", ends)
    monkeypatch.setattr(batched, "_ends", ends)
    with rows_computed(batched) as rows:
        base, tuned = read_together(*(batched.stream(PROMPTS[0], SHORT, side) for side in ("base", "tuned")))
    assert [base, tuned] == [read(case.backend.stream(PROMPTS[0], SHORT, side)) for side in ("base", "tuned")]
    assert base[1] == "end_of_text"
    assert len(base[0]) == drawn.index(drawn[3]) + 1
    assert set(rows) == {1, 2}


def test_nobody_waits_for_a_slow_reader(case: Case, batched: TransformersBackend) -> None:
    """Base is read to its end before tuned's second token is: both were computed in one batch all the same."""
    base_is_read = threading.Event()
    tuned_pieces: list[str] = []

    def read_slowly() -> None:
        stream = batched.stream(PROMPTS[0], SHORT, "tuned")
        tuned_pieces.append(next(stream))
        assert base_is_read.wait(60)
        tuned_pieces.extend(read(stream)[0])

    thread = threading.Thread(target=read_slowly)
    with rows_computed(batched) as rows:
        thread.start()
        base = read(batched.stream(PROMPTS[0], SHORT, "base"))
        base_is_read.set()
        thread.join()
    assert base == read(case.backend.stream(PROMPTS[0], SHORT, "base"))
    assert tuned_pieces == read(case.backend.stream(PROMPTS[0], SHORT, "tuned"))[0]
    assert rows.count(2) >= min(len(base[0]), len(tuned_pieces))


# Compare


def test_a_pair_of_compare_is_one_batch(case: Case, batched: TransformersBackend, smollm2: models.ModelSpec) -> None:
    engine = Engine(smollm2, models.AdapterSpec("random", case.adapter, ""), batched)
    with rows_computed(batched) as rows:
        pair = list(stream_pair(engine, PROMPTS[0], WARM, strength=1.5))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "base", WARM)
    assert pair.right.text == text_of(case.backend, PROMPTS[0], "tuned", WARM, 1.5)
    assert rows[0] == 2


@pytest.mark.usefixtures("nobody_waits")
def test_two_samples_of_one_side_go_alone(case: Case, batched: TransformersBackend, smollm2: models.ModelSpec) -> None:
    engine = Engine(smollm2, models.AdapterSpec("random", case.adapter, ""), batched)
    with rows_computed(batched) as rows:
        pair = list(stream_samples(engine, PROMPTS[0], WARM, "tuned"))[-1]
    assert isinstance(pair, GenerationPair)
    assert pair.left.text == text_of(case.backend, PROMPTS[0], "tuned", WARM)
    assert set(rows) == {1}


# Who meets whom


def test_a_cpu_computes_side_after_side_unless_asked(case: Case, batched: TransformersBackend) -> None:
    if case.backend.device.startswith("CPU"):
        assert not case.backend.batches_sides
    assert batched.batches_sides


@pytest.mark.usefixtures("nobody_waits")
def test_a_side_whose_other_never_comes_goes_alone(case: Case, batched: TransformersBackend) -> None:
    with rows_computed(batched) as rows:
        results = read_together(batched.stream(PROMPTS[0], SHORT, "base"), batched.stream(PROMPTS[1], SHORT, "tuned"))
    assert results == [
        read(case.backend.stream(PROMPTS[0], SHORT, "base")),
        read(case.backend.stream(PROMPTS[1], SHORT, "tuned")),
    ]
    assert set(rows) == {1}
    assert batched._pairing._waiting == []


def test_without_an_adapter_nobody_is_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_args: Any) -> None:
        raise AssertionError("waited")

    monkeypatch.setattr(Pairing, "batch_of", wait)
    backend = open_transformers(case.folder, case.template, None, 512, device="cpu", batch_sides=True)
    assert text_of(backend, PROMPTS[0], "base") == text_of(case.backend, PROMPTS[0], "base")
    backend.close()


def test_many_pairs_at_a_time_do_not_mix(case: Case, batched: TransformersBackend) -> None:
    """Three pairs of one prompt and one of another, each tuned side at a strength of its own: eight threads."""
    wanted = [(prompt, side, x) for prompt, x in ((0, 1.0), (0, 0.3), (0, 1.5), (1, 1.0)) for side in ("base", "tuned")]
    streams = [batched.stream(PROMPTS[prompt], SHORT, side, strength=x) for prompt, side, x in wanted]
    alone = [read(case.backend.stream(PROMPTS[prompt], SHORT, side, strength=x)) for prompt, side, x in wanted]
    with rows_computed(batched) as rows:
        assert read_together(*streams) == alone
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
def test_the_proof_fails_on_a_batch_that_mixes_its_rows_up(
    case: Case, monkeypatch: pytest.MonkeyPatch, rows: list[str], match: str
) -> None:
    """Each side alone is right: a proof of that alone would pass."""
    call = hf._RowHook.__call__

    def mix_up(hook: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        told = call(hook, layer, args, kwargs)
        return told and (args, kwargs | {"adapter_names": rows})

    monkeypatch.setattr(hf._RowHook, "__call__", mix_up)
    with pytest.raises(ProofError, match=match):
        open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=True)
    open_transformers(case.folder, case.template, case.adapter, 512, device="cpu", batch_sides=False).close()
