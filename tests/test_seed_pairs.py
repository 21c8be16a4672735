"""The seed set in assets/seed_pairs.jsonl: enough of it, varied, balanced in length, and nobody else's."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from biasdpo.data.near_duplicates import normalize
from biasdpo.data.pairs import derive
from biasdpo.data.splits import load_file
from biasdpo.workspace import ASSETS

FILE = ASSETS / "seed_pairs.jsonl"
BIASDPO = Path(__file__).resolve().parents[2] / "shared" / "data" / "biasdpo.jsonl"
TEXTS = ("prompt", "chosen", "rejected")
FORMS = {"question", "completion", "advice", "dialogue", "story", "work", "school", "health", "law", "media"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def word_trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """The plain words, three by three, without padding."""
    words = normalize(text).split()
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def sentences(text: str) -> set[str]:
    """Sentences of at least three words, normalised."""
    return {s for s in map(normalize, re.split(r"(?<=[.!?])\s+|\n", text)) if len(s.split()) >= 3}


def test_at_least_80_a_category_with_intersections_and_all_forms(rows):
    categories = Counter(row["category"] for row in rows)
    assert set(categories) == {"gender", "race", "religion"}
    assert min(categories.values()) >= 80
    assert len(rows) >= 240
    crossed = Counter(row["category"] for row in rows if row["intersection"])
    assert all(crossed[category] >= 15 for category in categories)
    forms = Counter(row["form"] for row in rows)
    assert set(forms) == FORMS
    assert min(forms.values()) >= 15


def test_every_row_is_a_pair_of_its_own_with_strings_alone(rows):
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert all(row[column] == row[column].strip() != "" for row in rows for column in (*TEXTS, "target_group"))
    assert len(derive(load_file(FILE)).pairs) == len(rows) == len({row["id"] for row in rows})


def test_chosen_is_the_longer_one_about_half_of_the_time(rows):
    for length in (len, lambda text: len(text.split())):  # characters, and words
        for category in (None, "gender", "race", "religion"):
            kept = [row for row in rows if category in (None, row["category"])]
            share = sum(length(row["chosen"]) > length(row["rejected"]) for row in kept) / len(kept)
            assert 0.45 <= share <= 0.55, (category, share)
    assert all(0.5 < len(row["chosen"]) / len(row["rejected"]) < 2 for row in rows)


def test_no_prompt_is_a_template_copy_of_another(rows):
    grams = [word_trigrams(row["prompt"]) for row in rows]
    near = [(i, j) for i, j in combinations(range(len(rows)), 2) if len(grams[i] & grams[j]) / len(grams[i] | grams[j]) > 0.4]
    assert near == []


def test_the_first_words_tell_nothing(rows):
    """Pairs that say "No, …" against "Yes, …" would teach the first word, not the content."""
    chosen, rejected = (Counter(row[c].split()[0].casefold() for row in rows) for c in ("chosen", "rejected"))
    assert max(chosen.values()) <= len(rows) / 15
    assert all(abs(chosen[word] - rejected[word]) <= 5 for word in set(chosen) | set(rejected))


def test_chosen_neither_evades_nor_preaches(rows):
    sermon = re.compile(
        r"as an ai\b|language model|it is (important|crucial|essential) to|everyone deserves|stereotyp|regardless of|"
        r"should be treated (equally|with respect)|I (can't|cannot) (answer|help)",
        re.IGNORECASE,
    )
    found = [(row["id"], match[0]) for row in rows if (match := sermon.search(row["chosen"]))]
    assert len(found) <= len(rows) * 0.02, found


@pytest.mark.skipif(not BIASDPO.is_file(), reason="the BiasDPO data set is not here")
def test_no_sentence_is_of_the_biasdpo_data_set(rows):
    theirs: set[str] = set()
    for line in BIASDPO.read_text(encoding="utf-8").splitlines():
        theirs |= set().union(*(sentences(json.loads(line)[column]) for column in TEXTS))
    assert len(theirs) > 1000
    ours = set().union(*(sentences(row[column]) for row in rows for column in TEXTS))
    assert ours & theirs == set()
