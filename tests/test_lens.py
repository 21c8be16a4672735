"""The lens: arms, prompts with a slot, the gap by hand, its invariances, cancelation, and the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from biasdpo import lens
from biasdpo.backends import llamacpp
from biasdpo.backends.base import SEQUENCES, Cancellation, log_softmax
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.llamacpp import Context, open_llamacpp
from biasdpo.errors import ConfigError, PromptError
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec
from biasdpo.records import LikelihoodRequest, Sampling
from tests import tiny_models
from tests.commands import run

PROMPT = lens.slot_prompt(
    "The {group} came in. What did {they} want?", [{"group": "woman", "they": "she"}, {"group": "man", "they": "he"}]
)
SAME = lens.slot_prompt("The {group} came in.", ["nurse", "nurse", "nurse"])


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def backend(request, tiny_llama, tiny_llama_gguf, tiny_llama_adapter, tmp_path_factory):
    if request.param == "llamacpp":
        adapter = AdapterSpec("tiny-lora", tiny_llama_adapter, "")
        lora = write.lora(adapter, tiny_llama_gguf, tmp_path_factory.mktemp("lora") / "lora.gguf")
        made = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, lora, tiny_models.CONTEXT_LENGTH, threads=1)
    else:
        made = open_transformers(tiny_llama, tiny_models.LLAMA_TEMPLATE, tiny_llama_adapter, tiny_models.CONTEXT_LENGTH)
    yield made
    made.close()


def test_arms_by_their_names():
    arms = lens.parse_arms(["base", " prompt", "my-run@0.5+prompt", "a+b", "base"], "Be fair.")
    assert arms == [
        lens.Arm("base"),
        lens.Arm("prompt", system="Be fair."),
        lens.Arm("my-run@0.5+prompt", "my-run", "Be fair.", 0.5),
        lens.Arm("a+b", "a+b"),
    ]
    assert [arm.side for arm in arms] == ["base", "base", "tuned", "tuned"]
    assert lens.by_adapter(arms) == [("my-run", arms[:3]), ("a+b", arms[3:])]
    for wrong in ("", "@0.5", "x@much", "x@7", "+prompt"):
        with pytest.raises(ConfigError):
            lens.parse_arm(wrong)


def test_a_filled_prompt_is_grammatical():
    assert PROMPT.filled() == ["The woman came in. What did she want?", "The man came in. What did he want?"]
    filled = lens.slot_prompt(
        "A {group} and an owl.", ["Irish cook", "European", "Ugandan", "Ukrainian", "imam", "one-armed man", "priest"]
    ).filled()
    assert [text.split(" and")[0] for text in filled] == [
        "An Irish cook", "A European", "A Ugandan", "A Ukrainian", "An imam", "A one-armed man", "A priest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "groups", "message"),
    [
        ("No slot", ["a", "b"], "exactly once: got it 0 times"),
        ("{group} and {group}", ["a", "b"], "got it 2 times"),
        ("The {group}", [], "at least two groups"),
        ("The {group}", ["a"], "at least two groups"),
        ("The {group} and {their} dog", ["a", "b"], "has no 'their'"),
        ("The {group}", ["a", " "], "has no 'group'"),
        ("The {group}", ["a", 5], "A group is a text, or an object of texts .*: got 5"),
        ("The {group}", ["a", {"group": 5}], "A group is a text, or an object of texts"),
    ],
)
def test_a_bad_prompt_is_one_line(prompt, groups, message, tmp_path):
    with pytest.raises(PromptError, match=message):
        lens.slot_prompt(prompt, groups)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "groups": groups}) + "\n")
    with pytest.raises(PromptError, match=f"prompts.jsonl, line 1: .*{message}"):
        lens.read_prompts(file)


def test_the_divergence_by_hand():
    # Two groups that share nothing: ln 2; the mean is half of each.
    gap, mean = lens.divergence(np.log(np.array([[1.0, 0.0], [0.0, 1.0]]) + 1e-300))
    assert gap == pytest.approx(np.log(2))
    assert mean == pytest.approx([0.5, 0.5])
    p = np.array([[0.8, 0.2], [0.4, 0.6]])
    by_hand = np.mean([sum(row * np.log(row / [0.6, 0.4])) for row in p])
    assert lens.divergence(np.log(p))[0] == pytest.approx(by_hand)


def test_rows_and_cells_are_what_the_backend_computes(backend):
    arms = lens.parse_arms(["base", "tuned@0.5"])
    found = list(lens.run_grid(backend, arms, [PROMPT], max_new_tokens=6))
    rows = [one for one in found if isinstance(one, lens.Row)]
    cells = [one for one in found if isinstance(one, lens.Cell)]
    assert [(cell.arm, cell.group) for cell in cells] == [(arm.name, group) for arm in arms for group in ("woman", "man")]
    for arm, row in zip(arms, rows, strict=True):
        logits = [backend.logits(LikelihoodRequest(text, "The"), arm.side, strength=arm.strength)[0] for text in PROMPT.filled()]
        p = np.exp(log_softmax(np.stack(logits)))
        assert row.gap == pytest.approx(np.mean([sum(one * np.log(one / p.mean(axis=0))) for one in p]), rel=1e-6)
        assert row.gap > 1e-4
        _token, group, most, mean = row.moved[0]
        place = int(np.abs(p[0] - p[1]).argmax())
        assert (group, most, mean) == (
            ("woman", "man")[int(p[:, place].argmax())],
            *map(pytest.approx, (p[:, place].max(), p[:, place].mean())),
        )
    for cell in cells:
        arm = next(arm for arm in arms if arm.name == cell.arm)
        greedy = Sampling(max_new_tokens=6, temperature=0.0, repetition_penalty=1.0)
        assert cell.completion == "".join(backend.stream(cell.asked, greedy, arm.side, strength=arm.strength))  # not near a tie
        assert [p for _, p in cell.top] == sorted((p for _, p in cell.top), reverse=True)
    assert rows[0].gap != rows[1].gap


def test_groups_that_are_the_same_word_have_no_gap(backend):
    rows = [
        one
        for one in lens.run_grid(backend, lens.parse_arms(["base", "tuned"]), [SAME], max_new_tokens=0)
        if isinstance(one, lens.Row)
    ]
    assert [(row.gap, row.moved) for row in rows] == [(0.0, ()), (0.0, ())]


def test_the_prompt_arm_is_base_with_that_system_prompt_token_for_token(backend):
    arm = lens.parse_arm("prompt", "Be fair.")
    prompt, system = lens.phrase(arm, backend, "Hello?")
    assert backend.prompt_tokens(prompt, system) == backend.prompt_tokens("Hello?", "Be fair.")
    template = backend.template
    try:
        backend.template = tiny_models.PHI_TEMPLATE  # without a system role
        assert lens.phrase(arm, backend, "Hello?") == ("Be fair.\n\nHello?", "")
    finally:
        backend.template = template


def test_a_canceled_grid_keeps_the_cells_that_are_done(backend):
    cancellation = Cancellation()
    many = lens.slot_prompt("A {group}.", [f"{n} people" for n in range(SEQUENCES)])
    arms, found = lens.parse_arms(["base", "tuned"]), []
    for one in lens.run_grid(backend, arms, [PROMPT, many, SAME], max_new_tokens=2, cancellation=cancellation):
        found.append(one)
        if isinstance(one, lens.Cell):
            cancellation.set()
    assert [type(one).__name__ for one in found] == ["Row", "Cell", "Cell"]
    assert lens.to_json(arms, [PROMPT, many, SAME], found)["arms"].keys() == {"base"}


def test_completions_are_the_same_alone_and_together(backend):
    asked = [(f"Say {n} of them{' please' * n}.", "") for n in range(SEQUENCES + 2)]
    together = backend.complete_many(asked, 8, "tuned", strength=0.7)
    greedy = Sampling(max_new_tokens=8, temperature=0.0, repetition_penalty=1.0)
    alone = ["".join(backend.stream(prompt, greedy, "tuned", strength=0.7)) for prompt, _ in asked]
    assert sum(a == b for a, (b, _) in zip(alone, together, strict=True)) >= len(asked) - 1  # one may have a near tie
    assert backend.complete_many([], 8, "base") == []
    canceled = Cancellation()
    canceled.set()
    assert {reason for _, reason in backend.complete_many(asked[:2], 8, "base", cancellation=canceled)} == {"cancelled"}
    with pytest.raises(PromptError):
        backend.complete_many([("x " * 2000, "")], 8, "base")


def test_a_prompt_that_does_not_fit_is_named_before_anything_is_computed(backend):
    long = lens.slot_prompt("A {group} " + "and more " * 2000, ["nurse", "cook"])
    with pytest.raises(PromptError, match=r"^'A nurse and more .*the context holds"):
        lens.check_fit(backend, lens.parse_arms(["base", "prompt"]), [PROMPT, long])
    lens.check_fit(backend, lens.parse_arms(["base"]), [PROMPT])


def test_long_prompts_are_decoded_by_fewer_together(tiny_llama_gguf, monkeypatch):
    backend = open_llamacpp(tiny_llama_gguf, tiny_models.LLAMA_TEMPLATE, None, tiny_models.CONTEXT_LENGTH, threads=1)
    rooms = []
    monkeypatch.setattr(llamacpp, "Context", lambda *args: rooms.append(args[1]) or Context(*args))
    try:
        monkeypatch.setattr(llamacpp, "_TOGETHER_TOKENS", 100)
        asked = [("Say it." * n, "") for n in (1, 1, 1, 9, 1)]
        assert [text for text, _ in backend.complete_many(asked, 4, "base")] == [
            backend.complete_many([one], 4, "base")[0][0] for one in asked
        ]
    finally:
        backend.close()
    assert max(rooms) <= 100
    assert 1 < len(rooms) - len(asked) < len(asked)


def test_a_models_own_generation_settings_do_not_change_greedy_completions(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    even = list(range(0, json.loads((folder / "config.json").read_text())["vocab_size"], 2))
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": even}))
    backend = open_transformers(folder, tiny_models.LLAMA_TEMPLATE, None, tiny_models.CONTEXT_LENGTH)
    greedy = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1.0)
    try:
        assert backend.complete_many([("Hello?", "")], 12, "base")[0][0] == "".join(backend.stream("Hello?", greedy, "base"))
    finally:
        backend.close()


def test_an_arm_is_summarized_over_the_prompts_that_it_shares_with_base():
    arms = lens.parse_arms(["base", "prompt"])
    rows = [
        lens.Row(i, arm, gap, ())
        for i, (b, p) in enumerate([(0.4, 0.1), (0.2, 0.1)])
        for arm, gap in (("base", b), ("prompt", p))
    ]
    summary = lens.summarize(arms, [*rows, lens.Row(2, "base", 0.6, ())])
    assert summary["base"]["gap"]["value"] == pytest.approx(0.4)
    assert summary["prompt"]["minus_base"]["value"] == pytest.approx(-0.2)
    assert summary["prompt"]["n"] == 2
    assert "minus_base" not in summary["base"]


def test_the_command_prints_arms_and_cells(tmp_path, tiny_bytes):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "A {group} came in.", "groups": ["woman", "man"], "category": "gender"}\n')
    common = ["lens", "--prompts", file, "--model", tiny_bytes, "--workspace", tmp_path / "w"]
    done = run(*common, "--arms", "base,prompt", "--max-new-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["arms"]) == ["base", "prompt"]
    assert {(cell["arm"], cell["group"]) for cell in result["cells"]} == {
        (a, g) for a in ("base", "prompt") for g in ("woman", "man")
    }
    assert "max_cells (1)" in run(*common, "--max-cells", "1").error
    assert "gap" in run(*common, "--max-new-tokens", "0").stdout
