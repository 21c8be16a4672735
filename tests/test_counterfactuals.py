"""The texts and questions that the counterfactual terms draw."""

from __future__ import annotations

import re
from random import Random

import pytest

from biasdpo.counterfactuals import Counterfactuals
from biasdpo.data.health import load_overlap
from tests.app_process import ROOT

BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
TEMPLATES = Counterfactuals()


def draw_both(seed, count):
    draw = Random(seed)
    return [(TEMPLATES.twins(draw), TEMPLATES.question(draw)) for _ in range(count)]


def test_draws_depend_on_the_seed_alone():
    assert draw_both(1, 20) == draw_both(1, 20)
    assert draw_both(1, 20) != draw_both(2, 20)


def test_twins_differ_and_are_clean_and_either_group_comes_first():
    firsts = set()
    for twins, _ in draw_both(0, 3000):
        one, other = twins.texts()
        assert one != other
        for text in (one, other):
            assert not re.search(r"[{}]|  | [.,]|^ |^[a-z]", text), text
        assert isinstance(twins.parts[-1], str)  # what both say of their groups
        firsts.add(one.split()[0])
    assert {"Men", "Women"} <= firsts


def test_a_question_is_answered_by_what_its_text_says_and_by_nothing_else():
    tables = TEMPLATES._tables["questions"]
    unknown = set(tables["unknown"])
    paraphrases = {deed: said for row in tables["deeds"] for deed, said in zip(row[:2], row[2:], strict=True)}
    questions = [question for _, question in draw_both(0, 3000)]
    answered = sum(question.answered for question in questions)
    assert 0.77 < answered / 3000 < 0.83
    literal = 0
    for question in questions:
        assert not re.search(r"[{}]|  | [.,]", question.context.replace("\n", ""))
        right, *wrong = (answer.strip() for answer in (question.right, *question.wrong))
        assert len({right, *wrong}) == 1 + len(wrong)
        assert all(answer.startswith(" ") != question.context.endswith("\n") for answer in (question.right, *question.wrong))
        asks = re.fullmatch(r"(.*)(?:Who|who|Which of them)(?: was it that)? (.*?)\?.*", question.context, re.DOTALL)
        said, asked = asks.groups()
        if not question.answered:
            assert asked not in said
            assert right in unknown
            assert not unknown & set(wrong)
            continue
        assert right not in unknown
        assert [answer in unknown for answer in wrong] == [False, True, True, True]
        (phrase,) = {phrase for phrase in (asked, paraphrases[asked]) if phrase in said}
        literal += phrase == asked
        # Who is named last before the deed did it.
        names = [re.sub("^The ", "", answer) for answer in (right, wrong[0])]
        mentions = re.findall("|".join(rf"\b{re.escape(name)}\b" for name in [*names, "other one"]), said[: said.rindex(phrase)])
        subject = mentions[-1] if mentions[-1] != "other one" else next(name for name in names if name != mentions[-2])
        assert subject == names[0], question
    assert 0.5 < literal / answered < 0.7


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmark files beside the checkout")
def test_no_eight_words_are_a_benchmarks():
    """The leakage check, over many draws and every benchmark file at hand."""
    texts = [text for twins, question in draw_both(0, 3000) for text in (*twins.texts(), question.context)]
    assert not load_overlap(BENCHMARKS).files_of(texts)
