"""What benchmarks by generation ask for, and what becomes of it: seeds, both sides at once, what is kept, a stop, failures."""

from __future__ import annotations

import json
import threading
import time

import pytest

from biasdpo import benchmarks
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.llamacpp import open_llamacpp
from biasdpo.benchmarks.bold import Beginning, Bold
from biasdpo.benchmarks.real_toxicity_prompts import RealToxicityPrompts, WebText
from biasdpo.benchmarks.toxicity import ToxicityScorer
from biasdpo.benchmarks.utility import Prompt, UtilityGeneration
from biasdpo.chat import BARE
from biasdpo.config import BENCHMARKS
from biasdpo.engines import Engine, EngineKey, open_engine
from biasdpo.errors import BackendError, ConfigError, PromptError
from biasdpo.evaluation import run
from biasdpo.evaluation.run import requests_of
from biasdpo.records import Sampling
from tests import commands
from tests.evaluating import fake_engine, write_rows

BY_LENGTH = ToxicityScorer("by_length", "1", lambda texts: [min(len(text) / 20, 1.0) for text in texts])


class Writer:
    """Stands for a backend that writes the prompt's first word, its side and its seed's last digit. `asked` is what it was."""

    name = "fake"
    device = "CPU"

    def __init__(self, template) -> None:
        self.template = template
        self.asked: list[tuple[str, str, int]] = []
        self.meet = threading.Barrier(1)
        self.block_at = ""

    def stream(self, prompt, sampling, side, *, template, cancellation, **_options):
        assert template is BARE
        if prompt.startswith("long"):
            raise PromptError("The prompt is 5,000 tokens long: shorten the prompt")
        self.meet.wait(timeout=20)
        self.asked.append((side, prompt, sampling.seed))
        while prompt == self.block_at:
            if cancellation.is_set():
                return "cancelled"
            time.sleep(0.01)
            yield ""
        if not prompt.startswith("silent"):
            yield prompt.split()[0]
            yield f" {side}"
            yield f" {sampling.seed % 10}"
        return "end_of_text"


@pytest.fixture
def engine(smollm2, tmp_path):
    return fake_engine(smollm2, tmp_path, Writer(smollm2.template))


def web(*texts: str, samples: int = 2) -> RealToxicityPrompts:
    return RealToxicityPrompts([WebText(text, 0.1) for text in texts], BY_LENGTH, samples)


def test_seeds_are_of_the_prompt_and_the_sample():
    two, three = web("a", "b"), web("b", samples=3)
    of_a, of_b = (requests_of(two, item, 7) for item in two.items)
    assert requests_of(three, three.items[0], 7)[:2] == of_b  # neither other items nor more samples change them
    seeds = [request.sampling.seed for request in (*of_a, *of_b, *requests_of(two, two.items[0], 8))]
    assert len(set(seeds)) == 6  # each prompt, each sample, each evaluation's seed has one of its own
    assert all(request.bare for request in of_a)
    greedy = UtilityGeneration([Prompt("a", "neutral")])
    assert requests_of(greedy, greedy.items[0], 7) == greedy.requests(greedy.items[0])
    assert greedy.requests(greedy.items[0])[0].sampling.seed == 0


def test_both_sides_write_at_once_and_a_repeat_writes_nothing(engine, workspace):
    engine.backend.meet = threading.Barrier(2)  # breaks where one side waits for the other to end
    first = run.run(engine, [web("sun rises", "moon sets")], workspace=workspace)
    result = first["benchmarks"]["real_toxicity_prompts"]
    assert (result["n"], result["n_failed"], result["not_comparable"]) == (2, 0, "")
    assert result["settings"]["samples"] == 2
    assert result["settings"]["toxicity_scorer"] == "by_length 1"
    item = result["items"][0]
    seeds = [seed for side, prompt, seed in engine.backend.asked if (side, prompt) == ("tuned", "sun rises")]
    assert item["completions"] == {
        "base": [f"sun base {seed % 10}" for seed in seeds],
        "tuned": [f"sun tuned {seed % 10}" for seed in seeds],
    }
    assert item["base"] == [10 / 20, 1.0, 10 / 20, 10 / 20]  # "sun base 3" has 10 characters
    assert item["tuned"] == [11 / 20, 1.0, 11 / 20, 11 / 20]
    assert item["outcome"] == dict.fromkeys(("base", "tuned"), "toxic by by_length")
    assert result["difference"]["by_length_expected_max"]["value"] == pytest.approx(1 / 20)
    assert len(engine.backend.asked) == 2 * 2 * 2
    engine.backend.asked.clear()
    assert run.run(engine, [web("sun rises", "moon sets")], workspace=workspace) == first
    assert engine.backend.asked == []
    # More samples ask for those that are new; another strength asks for the tuned side alone.
    run.run(engine, [web("sun rises", samples=3)], workspace=workspace)
    assert sorted(side for side, _, _ in engine.backend.asked) == ["base", "tuned"]
    engine.backend.asked.clear()
    engine.backend.meet = threading.Barrier(1)
    run.run(engine, [web("sun rises")], workspace=workspace, strengths=[0.5])
    assert [side for side, _, _ in engine.backend.asked] == ["tuned", "tuned"]
    # Base alone, kept nowhere.
    alone = run.run(Engine(engine.spec, None, engine.backend), [web("sun rises")])
    assert alone["benchmarks"]["real_toxicity_prompts"]["items"][0]["completions"].keys() == {"base"}


def test_a_stop_inside_a_completion_keeps_what_was_whole(engine, workspace):
    texts = ["sun rises", "moon sets", "wind blows"]
    engine.backend.block_at = "moon sets"  # never ends by itself
    done: list[int] = []
    begun = time.monotonic()
    options = {"on_item": lambda _name, so_far, _total: done.append(so_far), "should_stop": lambda: len(done) == 1}
    stopped = run.run(engine, [web(*texts)], workspace=workspace, **options)
    assert time.monotonic() - begun < 10
    result = stopped["benchmarks"]["real_toxicity_prompts"]
    assert (result["n"], result["not_comparable"]) == (1, "interrupted after 1 of 3 items")
    assert stopped["provenance"]["interrupted"] is True
    # A benchmark that had scored nothing yet is left out, and the others stay.
    done.clear()
    two = [web("sun rises"), Bold([Beginning("moon sets", "gender", "a")], BY_LENGTH)]
    cut = run.run(engine, two, workspace=workspace, **options)
    assert list(cut["benchmarks"]) == ["real_toxicity_prompts"]
    engine.backend.block_at = ""
    engine.backend.asked.clear()
    whole = run.run(engine, [web(*texts)], workspace=workspace)
    assert "sun rises" not in {prompt for _, prompt, _ in engine.backend.asked}
    assert whole["benchmarks"]["real_toxicity_prompts"]["n"] == 3
    # The disk took half of the last line: one completion is written again.
    for file in (workspace.cache / "scores").glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-9])
    engine.backend.asked.clear()
    assert run.run(engine, [web(*texts)], workspace=workspace) == whole
    assert sorted(side for side, _, _ in engine.backend.asked) == ["base", "tuned"]


def test_failed_items_are_counted_and_a_failed_scorer_is_an_error(engine, workspace):
    result = run.run(engine, [web("silent night", "sun rises", "long story")])["benchmarks"]["real_toxicity_prompts"]
    assert (result["n"], result["n_failed"]) == (1, 2)
    assert result["failures"] == [
        {"index": 0, "reason": "base and tuned wrote nothing that can be scored"},
        {"index": 2, "reason": "The prompt is 5,000 tokens long: shorten the prompt"},
    ]
    broken = ToxicityScorer("broken", "1", lambda _texts: 1 / 0)
    with pytest.raises(BackendError, match="The toxicity scorer broken failed: "):
        run.run(engine, [RealToxicityPrompts([WebText("sun", None)], broken, 1)], workspace=workspace)
    engine.backend.asked.clear()
    run.run(engine, [web("sun", samples=1)], workspace=workspace)
    assert engine.backend.asked == []  # what was written is scored anew, not written again


def test_an_engine_that_fails_ends_both_sides(engine):
    def stream(_prompt, _sampling, side, *, cancellation, **_options):
        if side == "base":
            raise BackendError("llama.cpp failed to compute a batch: reload the model")
        while not cancellation.is_set():
            time.sleep(0.01)
            yield ""
        return "cancelled"

    engine.backend.stream = stream
    with pytest.raises(BackendError, match="failed to compute"):
        run.run(engine, [web("sun rises")])


def test_on_the_embedded_model_twice_the_same(workspace):
    engine = open_engine(EngineKey("smollm2"), workspace)
    try:
        short = Sampling(max_new_tokens=6, temperature=1.0, top_p=0.9, top_k=0, repetition_penalty=1.0)
        people = Bold(
            [Beginning("The actress is known for", "gender", "a"), Beginning("He is a", "gender", "b")], BY_LENGTH, short
        )
        asked = [people, RealToxicityPrompts([WebText("The sun rose over", 0.1)], BY_LENGTH, 2, short)]
        asked.append(UtilityGeneration([Prompt("Why is the sky blue?", "neutral")], Sampling(8, 0.0, repetition_penalty=1.0)))
        found = run.run(engine, asked)["benchmarks"]
        assert run.run(engine, asked)["benchmarks"] == found
        (request,) = requests_of(people, people.items[0], 0)
        directly = "".join(engine.backend.stream(request.prompt, request.sampling, "tuned", template=BARE))
        assert found["bold"]["items"][0]["completions"]["tuned"] == [directly]
        one, other = found["real_toxicity_prompts"]["items"][0]["completions"]["base"]
        assert one != other
        assert found["utility_generation"]["base"]["mean_tokens"]["value"] == 8
        greedy = "".join(engine.backend.stream("Why is the sky blue?", Sampling(8, 0.0, repetition_penalty=1.0), "base"))
        assert found["utility_generation"]["items"][0]["completions"]["base"] == [greedy]  # rendered with the chat template
    finally:
        engine.backend.close()


def test_bare_text_goes_on_the_same_way_on_both_engines(smollm2, tiny_llama, tiny_llama_gguf):
    greedy = Sampling(12, 0.0, repetition_penalty=1.0)
    bare, chat = {}, {}
    for backend in (
        open_llamacpp(tiny_llama_gguf, smollm2.template, None, 256, threads=1, kv_cache="f32"),
        open_transformers(tiny_llama, smollm2.template, None, 256),
    ):
        try:
            bare[backend.name] = "".join(backend.stream("Write about\n", greedy, "base", template=BARE))
            chat[backend.name] = "".join(backend.stream("Write about\n", greedy, "base"))
        finally:
            backend.close()
    assert bare["llamacpp"] == bare["transformers"]
    assert set(bare.values()).isdisjoint(chat.values())


def test_utility_is_both_prices_and_perplexity_the_quick_half():
    assert benchmarks.expand(["bbq", "utility", "perplexity"]) == ["bbq", "utility", "utility_generation"]
    assert benchmarks.expand(["perplexity"]) == ["perplexity"]
    assert benchmarks.expand(["utility_generation", "utility"]) == ["utility_generation", "utility"]
    assert set(BENCHMARKS) == set(benchmarks.NAMES)
    with pytest.raises(ConfigError, match="Unknown benchmark 'bolt'"):
        benchmarks.expand(["bolt"])
    price = benchmarks.build("utility_generation", None)
    assert [sum(item.category == kind for item in price.items) for kind in ("neutral", "probing")] == [24, 24]
    assert len({item.prompt for item in price.items}) == 48


def test_the_command(tmp_path):
    row = {"prompt": {"text": "The sun rose ", "toxicity": 0.1}, "continuation": {"text": " over."}}
    write_rows(tmp_path / "data" / "real_toxicity_prompts" / "prompts.jsonl", [row])
    out = tmp_path / "result.json"
    common = ("evaluate", "--model", "smollm2", "--data-dir", tmp_path / "data", "--workspace", tmp_path / "w", "--out", out)
    done = commands.run(*common, "--benchmark", "real_toxicity_prompts", "--samples", "2", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    published = "not comparable with published figures: 2 samples a prompt, not 25; 3 tokens, not 20; scores of profanity"
    assert published in done.stdout
    item = json.loads(out.read_text())["benchmarks"]["real_toxicity_prompts"]["items"][0]
    assert [len(texts) for texts in item["completions"].values()] == [2, 2]
    for arguments, message in (
        (["--benchmark", "real_toxicity_prompts", "--toxicity-scorer", "perspective"], "Unknown toxicity scorer 'perspective'"),
        (["--benchmark", "real_toxicity_prompts", "--toxicity-scorer", "hub:owner/none"], "Can't load the classifier owner/none"),
        (["--benchmark", "bold"], "get them with `hf download AmazonScience/bold"),
    ):
        assert message in commands.run(*common, *arguments).error
