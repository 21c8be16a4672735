"""Our own pairs and prompts in assets/: enough of them, varied, balanced in length, and nobody else's."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from biasdpo.data.health import load_overlap
from biasdpo.data.near_duplicates import NearDuplicates, normalize
from biasdpo.data.pairs import derive
from biasdpo.data.splits import load_file
from biasdpo.workspace import ASSETS

SHARED = Path(__file__).resolve().parents[2] / "shared"
BIASDPO = SHARED / "data" / "biasdpo.jsonl"
TEXTS = ("prompt", "chosen", "rejected")
FORMS = {
    "seed": {"question", "completion", "advice", "dialogue", "story", "work", "school", "health", "law", "media"},
    "loaded": {"why", "continue", "trust", "typical", "fact", "everyday"},
}
EVERYDAY = ASSETS / "everyday_prompts.txt"
GROUPS = re.compile(
    r"\b(wom[ae]n|m[ae]n|girls?|boys?|mothers?|fathers?|wi(fe|ves)|husbands?|s?he|her|his|immigrants?|refugees?|religio\w*|church|"
    r"mosque|temple|god|muslims?|christians?|jew\w*|hindus?|sikhs?|buddhists?|atheists?|black|white|african|asian|gender|rac(e|ial))\b",
    re.IGNORECASE,
)


def pairs_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / f"{name}_pairs.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=FORMS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(name: str) -> list[dict[str, str]]:
    return pairs_of(name)


def word_trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """The plain words, three by three, without padding."""
    words = normalize(text).split()
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def sentences(text: str) -> set[str]:
    """Sentences of at least three words, normalised."""
    return {s for s in map(normalize, re.split(r"(?<=[.!?])\s+|\n", text)) if len(s.split()) >= 3}


def test_every_category_and_form_is_there(name, rows):
    categories = Counter(row["category"] for row in rows)
    assert set(categories) == {"gender", "race", "religion"}
    assert min(categories.values()) >= len(rows) * 0.32
    assert len(rows) >= {"seed": 240, "loaded": 350}[name]
    crossed = Counter(row["category"] for row in rows if row["intersection"])
    assert name != "seed" or all(crossed[category] >= 15 for category in categories)
    forms = Counter(row["form"] for row in rows)
    assert set(forms) == FORMS[name]
    assert min(forms.values()) >= 15


def test_every_row_is_a_pair_of_its_own_with_strings_alone(name, rows):
    assert all(isinstance(value, str) for row in rows for value in row.values())
    assert all(row[column] == row[column].strip() != "" for row in rows for column in (*TEXTS, "target_group"))
    assert len(derive(load_file(ASSETS / f"{name}_pairs.jsonl")).pairs) == len(rows) == len({row["id"] for row in rows})


def test_chosen_is_the_longer_one_about_half_of_the_time(name, rows):
    parts = {category: [row for row in rows if row["category"] == category] for category in ("gender", "race", "religion")}
    if name == "loaded":
        parts |= {form: [row for row in rows if row["form"] == form] for form in FORMS[name]}
    for length in (len, lambda text: len(text.split())):  # characters, and words
        for part, kept in (parts | {"all": rows}).items():
            share = sum(length(row["chosen"]) > length(row["rejected"]) for row in kept) / len(kept)
            assert 0.45 <= share <= 0.55, (part, share)
            ratio = sum(length(row["chosen"]) for row in kept) / sum(length(row["rejected"]) for row in kept)
            assert 0.95 <= ratio <= 1.05, (part, ratio)
    assert all(0.5 < len(row["chosen"]) / len(row["rejected"]) < 2 for row in rows)


def test_no_prompt_is_a_template_copy_of_another(rows):
    grams = [word_trigrams(row["prompt"]) for row in rows]
    near = [(i, j) for i, j in combinations(range(len(rows)), 2) if len(grams[i] & grams[j]) / len(grams[i] | grams[j]) > 0.4]
    assert near == []


def test_the_first_words_tell_nothing(rows):
    """Pairs that say "No, …" against "Yes, …" would teach the first word, not the content."""
    chosen, rejected = (Counter(row[c].split()[0].casefold() for row in rows) for c in ("chosen", "rejected"))
    assert max(chosen.values()) <= len(rows) / 15
    assert all(abs(chosen[word] - rejected[word]) <= len(rows) / 50 for word in set(chosen) | set(rejected))
    openings = Counter(" ".join(row["chosen"].casefold().split()[:2]) for row in rows)
    assert max(openings.values()) <= len(rows) * 0.03


def test_chosen_neither_evades_nor_preaches(name, rows):
    sermon = re.compile(
        r"as an ai\b|language model|(important|crucial|essential) to\b|everyone deserves|stereotyp|regardless of|"
        r"multifaceted|nuanced|complex\b|"
        r"should be treated (equally|with respect)|I (can't|cannot) (answer|help)",
        re.IGNORECASE,
    )
    found = [(row["id"], match[0]) for row in rows if (match := sermon.search(row["chosen"]))]
    if name == "loaded":  # answers that name a stereotype as such
        found = [(row_id, words) for row_id, words in found if words.casefold() != "stereotyp"]
    assert len(found) <= len(rows) * 0.02, found


@pytest.mark.skipif(not BIASDPO.is_file(), reason="the BiasDPO data set is not here")
def test_no_sentence_is_of_the_biasdpo_data_set(rows):
    theirs: set[str] = set()
    for line in BIASDPO.read_text(encoding="utf-8").splitlines():
        theirs |= set().union(*(sentences(json.loads(line)[column]) for column in TEXTS))
    assert len(theirs) > 1000
    ours = set().union(*(sentences(row[column]) for row in rows for column in TEXTS))
    assert ours & theirs == set()


def test_loaded_prompts_differ_from_the_other_prompts():
    """Neither near-duplicates of what is trained on besides, nor of the examples that the probes use."""
    index = NearDuplicates()
    files = (ASSETS / "seed_pairs.jsonl", ASSETS / "prompts.jsonl", *([BIASDPO] if BIASDPO.is_file() else []))
    index.add_all(json.loads(line)["prompt"] for file in files for line in file.read_text(encoding="utf-8").splitlines())
    count, prompts = len(index), [row["prompt"] for row in pairs_of("loaded")]
    found = [
        (prompt, near) for prompt, (number, near) in zip(prompts, index.add_all(prompts), strict=True) if near or number < count
    ]
    assert found == []


def test_everyday_prompts_name_no_group_and_are_not_those_of_the_utility_check():
    prompts = EVERYDAY.read_text(encoding="utf-8").splitlines()
    assert len(prompts) >= 400
    assert [prompt for prompt in prompts if prompt != prompt.strip() or GROUPS.search(prompt)] == []
    index = NearDuplicates()
    for measured in ("neutral_prompts.txt", "neutral_texts.txt"):
        index.add_all((ASSETS / measured).read_text(encoding="utf-8").splitlines())
    count = len(index)
    added = index.add_all(prompts)
    assert [prompt for prompt, (number, near) in zip(prompts, added, strict=True) if near or number < count] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not here")
def test_nothing_is_taken_from_a_benchmark():
    texts = [row[column] for row in pairs_of("loaded") for column in TEXTS]
    texts += EVERYDAY.read_text(encoding="utf-8").splitlines()
    assert not load_overlap(SHARED / "benchmarks").files_of(texts)


def test_no_prompt_of_the_blind_reading_is_trained_on():
    little = {
        "a",
        "an",
        "the",
        "is",
        "are",
        "do",
        "does",
        "to",
        "in",
        "for",
        "so",
        "it",
        "i",
        "my",
        "you",
        "they",
        "why",
        "how",
        "what",
    }

    def content(text: str) -> set[str]:
        return {word.removesuffix("s") for word in normalize(text).split()} - little

    read = [
        json.loads(line)["prompt"] for line in (ASSETS / "reading" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    trained = [row["prompt"] for name in FORMS for row in pairs_of(name)] + EVERYDAY.read_text(encoding="utf-8").splitlines()
    near = [(a, b) for a in read for b in trained if len(content(a) & content(b)) > 0.7 * len(content(a) | content(b))]
    assert near == []
