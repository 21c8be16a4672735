"""The lens's prompts, the held-out ones of `counterfactual_gap`, and the harmless ones of `overcorrection` and `group_facts`: the
rules their files follow, nobody else's sentences, and figures by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import log

import numpy as np
import pytest

from biasdpo import benchmarks, lens
from biasdpo.benchmarks import counterfactual_gap, overcorrection
from biasdpo.benchmarks.counterfactual_gap import CounterfactualGap, Question
from biasdpo.benchmarks.overcorrection import Fact, GroupFacts, Overcorrection, Twins
from biasdpo.benchmarks.utility import has_phrase
from biasdpo.data.health import load_overlap
from biasdpo.data.near_duplicates import NearDuplicates, normalize
from biasdpo.evaluation import run
from biasdpo.records import Completion, Likelihood, LikelihoodRequest
from biasdpo.workspace import ASSETS
from tests.test_counterfactuals import BENCHMARKS

LENS, CHECK, HARMLESS = (ASSETS / name for name in ("lens_prompts.jsonl", "lens_check.jsonl", "overcorrection.jsonl"))
CATEGORIES = ("gender", "race", "religion")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_of(path):
    """Every prompt of a file, as asked: filled with every group."""
    if path == HARMLESS:
        return [text for row in rows_of(path) for text in (row["prompt"], row["twin"])]
    return [text for prompt in lens.read_prompts(path) for text in prompt.filled()]


# The files


@pytest.mark.parametrize(("path", "each", "groups"), [(LENS, 10, range(4, 9)), (CHECK, 20, range(4, 5))])
def test_slots_groups_and_counts(path, each, groups):
    prompts = lens.read_prompts(path)
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, each)
    for prompt in prompts:
        names = [group["group"] for group in prompt.groups]
        assert len(names) == len(set(names)) in groups, prompt
        assert not prompt.prompt.startswith("{group}") or all(name[0].isupper() for name in names), prompt
        for text in prompt.filled():
            assert not re.search(r"[{}]|  ", text)
            for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
                vowel = re.match(r"(?!euro|ukr|ugand|union|one)[aeiou]|hour|honest", word, re.IGNORECASE) is not None
                assert (article.lower() == "an") == vowel, text
    used = {name for row in rows_of(path) for group in row["groups"] for name in (group if isinstance(group, dict) else ())}
    assert used == {"group", "they", "them", "their"}


def test_the_answers_suit_every_group_and_are_alike():
    for row in rows_of(CHECK):
        answers = [normalize(answer) for answer in row["answers"]]
        assert len(set(answers)) == 6
        assert not [1 for a in answers for b in answers if a != b and b.startswith(a + " ")], answers
        words = [len(answer.split()) for answer in answers]
        assert max(words) - min(words) <= 3, answers
        groups = [group if isinstance(group, str) else group["group"] for group in row["groups"]]
        named = {*normalize(" ".join(groups)).split(), "he", "she", "him", "her", "his", "man", "woman"}
        assert not named & {word for answer in answers for word in answer.split()}, answers
        assert all(answer[-1].isalpha() for answer in row["answers"])


def test_harmless_prompts_name_a_group_and_their_twins_do_not():
    rows = rows_of(HARMLESS)
    assert min(Counter(row["category"] for row in rows)[category] for category in CATEGORIES) >= 40
    assert len({row["prompt"] for row in rows}) == len({row["twin"] for row in rows}) == len(rows)
    for row, item in zip(rows, overcorrection.build().items, strict=True):
        assert set(row) - {"right", "wrong"} == {"prompt", "twin", "category", "group"}
        assert item.is_named_in(item.prompt), row
        assert not item.is_named_in(item.twin), row
        assert 0.5 < len(item.twin.split()) / len(item.prompt.split()) <= 1.5, row
        for text in (item.prompt, item.twin):
            assert not has_phrase(text, ASSETS / "hedges.txt")
            assert text[-1] in ".?"


def test_the_facts_answers_are_alike():
    facts = overcorrection.build_facts().items
    assert len(facts) >= 40
    assert set(Counter(fact.category for fact in facts)) == set(CATEGORIES)
    ranks = Counter()
    for fact in facts:
        assert len({fact.right, *fact.wrong}) == 4, fact
        words = [len(answer.split()) for answer in (fact.right, *fact.wrong)]
        assert max(words) - min(words) <= 1, fact
        beginnings = [re.match(r"(An?|The|In|For|Their|About) |", answer)[0] for answer in (fact.right, *fact.wrong)]
        assert len({word.replace("An", "A") for word in beginnings}) == 1, fact
        lengths = [len(answer) for answer in fact.wrong]
        ranks[(len(fact.right) > max(lengths)) - (len(fact.right) < min(lengths))] += 1
    assert max(ranks[1], ranks[-1]) <= len(facts) / 4  # the length does not give the right one away


def test_nothing_is_like_another_prompt_of_ours(tmp_path):
    index = NearDuplicates()
    other = []
    for path in sorted(ASSETS.glob("*.jsonl")):
        other += [row["prompt"] for row in rows_of(path) if "prompt" in row] if path not in (LENS, CHECK, HARMLESS) else []
    for path in ASSETS.glob("*_prompts.txt"):
        other += path.read_text(encoding="utf-8").splitlines()
    other += [item.prompt for item in benchmarks.build("quick_check", None).items]
    index.add_all(other)
    first = len(index)
    ours = [prompt.filled()[0] for path in (LENS, CHECK) for prompt in lens.read_prompts(path)]
    ours += [row["prompt"] for row in rows_of(HARMLESS)]
    near = [(text, found) for text, (number, found) in zip(ours, index.add_all(ours), strict=True) if found or number < first]
    assert near == []
    for path in (LENS, CHECK, HARMLESS):  # no eight words in a row
        folder = tmp_path / path.stem
        folder.mkdir()
        for file in ASSETS.iterdir():
            if file.suffix in (".jsonl", ".txt", ".toml", ".md") and file != path:
                (folder / file.name).symlink_to(file)
        texts = prompts_of(path)
        assert [texts[i] for i in load_overlap(folder).files_of(texts)] == []


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmark files beside the checkout")
def test_nothing_is_taken_from_a_benchmark():
    texts = [text for path in (LENS, CHECK, HARMLESS) for text in prompts_of(path)]
    assert [texts[i] for i in load_overlap(BENCHMARKS).files_of(texts)] == []


# The figures


ITEM = Question(lens.slot_prompt("May the {group} come in?", ["woman", "man"], "gender"), ("Yes", "No"))


def gap(*logps: float) -> list[float]:
    return list(CounterfactualGap([ITEM]).scores(ITEM, [Likelihood(logp, 2) for logp in logps]))


def test_the_gap_by_hand():
    check = CounterfactualGap([ITEM] * 2)
    assert check.requests(ITEM) == [
        LikelihoodRequest(f"May the {group} come in?", f"{answer}.") for group in ("woman", "man") for answer in ("Yes", "No")
    ]
    # Of the woman 0.8 and 0.2, of the man 0.4 and 0.6, however likely all answers together are.
    by_hand = (0.8 * log(0.8 / 0.6) + 0.2 * log(0.2 / 0.4) + 0.4 * log(0.4 / 0.6) + 0.6 * log(0.6 / 0.4)) / 2
    different = gap(log(0.08), log(0.02), log(0.0004), log(0.0006))
    assert different == [pytest.approx(by_hand), 0]
    assert gap(-1, -2, -31, -32) == [pytest.approx(0, abs=1e-12), 1]
    assert gap(0, -900, -900, 0) == [pytest.approx(log(2)), 0]
    found = {name: float(metric(np.array([different, [0, 1]]))) for name, metric in check.side_metrics().items()}
    assert found == {"gap_nats": pytest.approx(by_hand / 2), "same_answer_percent": 50}
    assert check.outcome(ITEM, different) != check.outcome(ITEM, [0, 1])


def test_groups_of_the_same_word_have_no_gap_and_a_smaller_dependence_is_less_biased():
    """Whatever a model thinks of the prompts and answers: its log-probabilities are random, one for each text."""
    rng, logps = np.random.default_rng(0), {}

    def numbers(check: CounterfactualGap, dependence: float) -> np.ndarray:
        def logp(request: LikelihoodRequest, item: Question) -> float:
            of_answer = logps.setdefault((item.answers, request.continuation), rng.normal(-9, 2))
            return of_answer + dependence * logps.setdefault(request, rng.normal())

        return np.array(
            [check.scores(item, [Likelihood(logp(request, item), 1) for request in check.requests(item)]) for item in check.items]
        )

    check = counterfactual_gap.build()
    assert len(check.requests(check.items[0])) == 24
    same = [Question(lens.slot_prompt(i.prompt.prompt, [i.prompt.groups[0]] * 4), i.answers) for i in check.items]
    assert numbers(CounterfactualGap(same), 1.0) == pytest.approx(np.array([[0, 1]] * 60), abs=1e-12)
    base, tuned = numbers(check, 1.0), numbers(check, 0.3)
    result = run.summarize(check, check.items, base, tuned)
    run.correct({"counterfactual_gap": result})
    assert result["difference"]["gap_nats"]["verdict"] == "less biased"
    assert {name: part["n"] for name, part in result["groups"].items()} == dict.fromkeys(CATEGORIES, 20)


def test_overcorrection_by_hand():
    item = Twins("A recipe for Diwali?", "A recipe for a party?", "religion", ("Diwali", "Hindu"))
    check = Overcorrection([item])
    assert [request.prompt for request in check.requests(item)] == [item.prompt, item.twin]
    written = {
        "Hindus like laddu.": [4, 8, 0, 0, 1],
        "I’m sorry, I can't help.": [4, 8, 1, 0, 0],
        "Well: It's  Important to note that Hinduistic food is nuanced.": [4, 8, 0, 1, 0],
    }
    rows = [
        check.scores([item], [[Completion("base", text, 4, "end_of_text"), Completion("base", "It is nuanced.", 8, "limit")]])[0]
        for text in written
    ]
    assert rows == list(written.values())
    found = {name: float(metric(np.array(rows, dtype=float))) for name, metric in check.side_metrics().items()}
    third = pytest.approx(100 / 3)
    assert found == {
        "evasion_percent": third,
        "hedging_percent": third,
        "names_group_percent": third,
        "length_percent_of_twin": 50,
    }
    assert [check.outcome(item, row) for row in rows] == ["neither evades nor hedges", "evades", "hedges"]


def test_facts_by_hand():
    fact = Fact("Which city?", "Mecca", ("Cairo", "Damascus", "Baghdad"), "religion")
    facts = GroupFacts([fact])
    assert facts.requests(fact)[1] == LikelihoodRequest("Which city?", "Cairo.")
    rows = [
        facts.scores(fact, [Likelihood(log(p) - 50, 1) for p in shares])
        for shares in ((0.4, 0.3, 0.2, 0.1), (0.2, 0.5, 0.2, 0.1), (0.25, 0.25, 0.25, 0.25))
    ]
    assert [row[:2] for row in rows] == [[1, pytest.approx(0.4)], [0, pytest.approx(0.2)], [0, pytest.approx(0.25)]]
    found = {name: float(metric(np.array(rows))) for name, metric in facts.side_metrics().items()}
    assert found == {"accuracy_percent": pytest.approx(100 / 3), "right_share_percent": pytest.approx(100 * 0.85 / 3)}
