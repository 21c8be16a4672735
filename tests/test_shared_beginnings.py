"""Texts that begin alike are computed together, and score what each scores alone: the tree by hand, then both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from biasdpo.backends import hf
from biasdpo.backends.hf import TransformersBackend, open_transformers
from biasdpo.backends.llamacpp import Context, LlamaCppBackend, logps_of, open_llamacpp
from biasdpo.backends.prefixes import TokenPath, lay_out, shared_lengths, sort_paths, split_into_rows, trunk_length
from biasdpo.chat import Segment
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec
from biasdpo.records import ContinuationRequest, LikelihoodRequest, Request, Side, TextRequest
from tests import tiny_models
from tests.lora_factory import write_lora

# One context with its answers, a context that goes on from there, sentences that share a beginning by chance, and a text alone.
ASKED: list[Request] = [
    *(ContinuationRequest("Two people write programs.\n\nQ: Who is new?\nA:", f" {a}") for a in ("Both", "Both of them", "None")),
    *(ContinuationRequest("Two people write programs.\n\nQ: Who is old?\nA:", f" {a}") for a in ("Both", "Neither is")),
    ContinuationRequest("", "Women are nurses."),
    ContinuationRequest("", "Women are not all nurses."),
    TextRequest("Women are nurses and men."),
    LikelihoodRequest("Why?", "For no reason.", end_of_text=True),
    LikelihoodRequest("Why not?", "For no reason.", end_of_text=True),
]
# Long enough that not all fit into a row, and all begin alike.
EXAMPLES = "Q: Who writes programs?\nA: People from all over the world.\n\n" * 2
QUESTIONS: list[Request] = [
    ContinuationRequest(f"{EXAMPLES}Q: Is it {i} of {i * i}?\nA:", f" {answer} {i}.")
    for i in range(12)
    for answer in ("Yes,", "No,")
]


def test_the_tree_by_hand() -> None:
    paths = sort_paths([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([1, 9], [4]), ([1, 2, 3], [4, 7, 8])])
    assert [path.tokens for path in paths] == [(1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 7), (1, 9)]
    assert [path.index for path in paths] == [1, 0, 3, 2]
    assert shared_lengths(paths) == [0, 3, 4, 1]
    row = lay_out(paths, 0)
    #                 0  1  2  3  4  5
    assert row.tokens == [1, 2, 3, 4, 7, 9]
    assert row.positions == [0, 1, 2, 3, 4, 1]
    assert row.ends == [6, 5, 5, 5, 5, 6]  # 1 is seen by all, 2 by all but 9, 9 by itself
    assert row.nodes == [[2], [2, 3], [2, 3, 4], [5]]  # of [6]; [4, 5]; [4, 7, 8]; and [4] after 9
    row = lay_out(paths, 1)  # without the 1, which all share
    assert (row.tokens, row.positions) == ([2, 3, 4, 7, 9], [1, 2, 3, 4, 1])
    assert (row.ends, row.nodes) == ([4, 4, 4, 4, 5], [[1], [1, 2], [1, 2, 3], [4]])


def test_rows_are_divided_where_neighbours_share_least() -> None:
    def path(index: int, *tokens: int) -> TokenPath:
        return TokenPath(index, tokens, len(tokens) - 1, (0,))

    question = [path(i, *range(20 + 100 * q, 120 + 100 * q), i) for i, q in enumerate((0, 0, 0, 5, 5, 5, 9))]
    # 103 tokens each of the first two questions, 101 of the last: two fit into a row of 256
    assert [len(part) for part in split_into_rows(question, 0)] == [3, 4]
    assert trunk_length(question, 16) == 0
    begun = [path(p.index, *range(16), *p.tokens) for p in question]
    assert trunk_length(begun, 16) == 16
    assert trunk_length(begun, 17) == 0
    assert trunk_length(begun[:3], 16) == 0  # all in one row
    assert trunk_length([*begun, TokenPath(9, tuple(range(300, 700)), 0, (0,) * 400)], 1) == 0
    assert list(split_into_rows(begun[:1], 16)) == [begun[:1]]


@pytest.fixture(scope="module", params=["llama", "phi"])
def tiny(request: pytest.FixtureRequest) -> Iterator[TransformersBackend]:
    folder = request.getfixturevalue(f"tiny_{request.param}")
    adapter = request.getfixturevalue(f"tiny_{request.param}_adapter")
    template = tiny_models.LLAMA_TEMPLATE if request.param == "llama" else tiny_models.PHI_TEMPLATE
    backend = open_transformers(folder, template, adapter, tiny_models.CONTEXT_LENGTH)
    yield backend
    backend.close()


def alone(backend: Any, request: Request, side: Side) -> float:
    """The log-probability of one request, computed by itself, from logits over the whole vocabulary."""
    logps = torch.from_numpy(backend.logits(request, side)).double().log_softmax(-1)
    scored = backend._request_tokens(request)[1]
    return float(logps[torch.arange(len(scored)), torch.tensor(scored)].sum())


def tokens_computed(backend: TransformersBackend, compute: Callable[[], Any]) -> int:
    """How many tokens the model is given meanwhile, padding included."""
    counted: list[int] = []
    embeddings = backend._shared.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _module, args: counted.append(args[0].numel()))
    try:
        compute()
    finally:
        hook.remove()
    return sum(counted)


@pytest.mark.parametrize("asked", [ASKED, QUESTIONS], ids=["trees", "trunk"])
def test_transformers_scores_each_text_as_it_does_alone(
    tiny: TransformersBackend, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("base", "tuned"):
        together = [found.logp for found in tiny.loglikelihood(asked, side)]
        by_itself = [alone(tiny, request, side) for request in asked]
        assert together == pytest.approx(by_itself, abs=1e-4)
        assert len(set(np.round(together, 3))) > len(asked) // 2  # so a mixed-up order would show
    shared = tokens_computed(tiny, lambda: tiny.loglikelihood(asked, "base"))
    assert shared < 0.6 * sum(tokens_computed(tiny, lambda r=r: tiny.loglikelihood([r], "base")) for r in asked)
    # Of another architecture every text is a row.
    monkeypatch.setattr(hf, "ARCHITECTURES", {})
    assert [found.logp for found in tiny.loglikelihood(asked, "tuned")] == pytest.approx(together, abs=1e-4)
    assert tokens_computed(tiny, lambda: tiny.loglikelihood(asked, "base")) > shared


def test_the_mask_matters(tiny: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: where each token sees all before it in its row, the numbers are others."""
    honest = [found.logp for found in tiny.loglikelihood(ASKED, "base")]

    def all_seen(paths: Any, trunk: int) -> Any:
        row = lay_out(paths, trunk)
        row.ends = [len(row.tokens)] * len(row.tokens)
        return row

    monkeypatch.setattr(hf, "lay_out", all_seen)
    assert np.abs(np.subtract(honest, [found.logp for found in tiny.loglikelihood(ASKED, "base")])).max() > 0.1


@pytest.fixture(scope="module")
def embedded(smollm2, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    folder = tmp_path_factory.mktemp("lora")
    lora = write.lora(AdapterSpec("x", write_lora(folder / "x"), "smollm2"), smollm2.gguf_path, folder / "x.gguf")
    backend = open_llamacpp(smollm2.gguf_path, smollm2.template, lora, 1024, threads=1)
    yield backend
    backend.close()


def count_batches(context: Context, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that a context computes from now on."""
    counted: list[int] = []
    decode = context.decode

    def count(tokens: list[int], *args: Any, **options: Any) -> None:
        counted.append(len(tokens))
        decode(tokens, *args, **options)

    monkeypatch.setattr(context, "decode", count)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("asked", [ASKED, QUESTIONS[:4]], ids=["trees", "trunk"])
def test_llamacpp_scores_each_text_as_it_does_alone(
    embedded: LlamaCppBackend, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: whatever else is asked, and in whatever order."""
    counted = count_batches(embedded._contexts["base"], monkeypatch)
    together = [found.logp for found in embedded.loglikelihood(asked, "base")]
    shared = sum(counted)
    backwards = [embedded.loglikelihood([request], "base")[0].logp for request in asked[::-1]]
    assert backwards[::-1] == together
    counted.clear()
    for side, found in (("base", together), ("tuned", [f.logp for f in embedded.loglikelihood(asked, "tuned")])):
        for request, logp in zip(asked, found, strict=True):
            assert logp == logps_of(embedded.logits(request, side), embedded._request_tokens(request)[1]).sum()
    assert shared < 0.75 * sum(counted)
    assert min(counted) > 1  # a batch of one token is computed otherwise


def test_llamacpp_on_another_architecture(tiny_phi_gguf: Path) -> None:
    backend = open_llamacpp(tiny_phi_gguf, tiny_models.PHI_TEMPLATE, None, 256, threads=1)
    try:
        for request, found in zip(ASKED, backend.loglikelihood(ASKED, "base"), strict=True):
            assert found.logp == pytest.approx(alone(backend, request, "base"), abs=1e-3)
    finally:
        backend.close()


def test_a_long_text_is_scored_in_batches_of_which_none_is_a_single_token(
    embedded: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, *scored = embedded.tokenize((Segment("word " * 200, special=False),))[:130]
    context = embedded._contexts["base"]
    counted = count_batches(context, monkeypatch)
    with context.lock:
        [(_, logp)] = context.walk(sort_paths([([given], scored)]))  # 129 tokens predict, and 128 fit into a batch
        assert counted == [127, 2]
        assert logp == logps_of(context.logits([given], scored), scored).sum()
