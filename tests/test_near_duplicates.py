"""Words and near-duplicate prompts: what normalising keeps, the Jaccard index by hand, recall against every pair."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from biasdpo.data import health
from biasdpo.data.health import NearDuplicates, jaccard, trigrams
from tests.judging import prompts

ROOT = Path(__file__).resolve().parent.parent


def test_normalising_ascii_fast_is_normalising() -> None:
    ascii_characters = "".join(map(chr, range(128)))
    for text in (ascii_characters, *(f"a{c}B {c} c" for c in ascii_characters), "", " ", "x" * 1000):
        plain = re.sub(r"[^\w\s]", "", unicodedata.normalize("NFKC", text).casefold())
        assert health.normalise(text) == re.sub(r"\s+", " ", plain).strip()
    for texts in ([], [""], ["One.", "", " two  THREE "], ["with a \x1e separator", "B"], ["ünder", "B."]):
        assert health.normalise_all(texts) == [health.normalise(text) for text in texts]
    assert health.normalise("Ünder  the ﬁre's STRASSE-straße") == "ünder the fires strassestrasse"


def test_a_words_hash_is_of_its_letters_alone() -> None:
    hashes, counts = health.word_hashes(["one two", "", "two", "ünder two one"])
    assert counts.tolist() == [2, 1, 1, 3]
    one, two, empty, again, under, third, fourth = hashes.tolist()
    assert (two, two, one, empty) == (again, third, fourth, 0)
    assert len({one, two, under, empty}) == 4
    script = "from biasdpo.data.health import word_hashes; print(word_hashes(['one'])[0][0])"
    assert int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout) == one
    vocabulary = [f"w{i}" for i in range(100_000)]
    assert len(set(health.word_hashes(vocabulary)[0].tolist())) == 100_000


def test_jaccard_of_trigrams() -> None:
    # "", "", a, b, c, "", "" has 5 trigrams; with d for c the first two ("", "", a and "", a, b) are shared: 2 / (5 + 5 - 2)
    assert jaccard(trigrams("a b c"), trigrams("a b d")) == 0.25
    one, other = "why do nurses earn less than doctors do", "why do nurses earn less than doctors"
    # 10 and 9 trigrams, the first 7 shared: 7 / 12
    assert jaccard(trigrams(one), trigrams(other)) == pytest.approx(7 / 12)
    assert NearDuplicates().add_all([one, other, other.upper() + "?", "a b c", "a b d"]) == [
        (0, []),
        (1, [0]),
        (1, []),
        (2, []),
        (3, []),
    ]


def test_near_duplicates_are_found_however_they_come() -> None:
    texts = prompts(2000)
    texts += [f"this is number {i} of many that differ in one word or two {i}" for i in range(1000)]  # more than a bucket offers
    random.Random(4).shuffle(texts)
    index = NearDuplicates()
    whole = index.add_all(texts)
    one_by_one, in_parts = NearDuplicates(), NearDuplicates()
    assert [one_by_one.add(text) for text in texts] == whole
    assert [found for i in range(0, 3000, 700) for found in in_parts.add_all(texts[i : i + 700])] == whole
    some = NearDuplicates().add_until_near(texts)
    assert [(number, bool(near)) for number, near in some] == [(number, bool(near)) for number, near in whole]
    assert all(set(few) <= set(near) for (_, few), (_, near) in zip(some, whole, strict=True))
    assert health.count_near_duplicates(texts) == sum(bool(near) for _number, near in whole)
    assert all(index.near(number) == near for number, near in whole[::50])
    assert [bool(near) for text, (_, near) in zip(texts, whole, strict=True) if text.startswith("this is")] == [False] + [
        True
    ] * 999


def test_near_duplicates_against_every_pair() -> None:
    """Nothing is called near that is not; of what is near, 99 % is found (DESIGN of the bands: 0.996 at the threshold)."""
    texts = prompts(1500, seed=2)
    found = {(number, other) for number, near in NearDuplicates().add_all(texts) for other in near}
    sets = [trigrams(health.normalise(text)) for text in texts]
    true = {(i, j) for i in range(len(sets)) for j in range(i) if sets[i] & sets[j] and jaccard(sets[i], sets[j]) >= 0.4}
    assert len(true) > 200
    assert found <= true
    assert len(found) >= 0.99 * len(true)


def test_recall_at_the_threshold() -> None:
    """2,000 prompts, each with a variant at 0.4 to 0.5, where a pair is hardest to find."""
    rng = random.Random(3)
    vocabulary = [f"word{i}" for i in range(5000)]
    originals, variants = [], []
    while len(originals) < 2000:
        text = rng.choices(vocabulary, k=12)
        variant = list(text)
        for place in rng.sample(range(12), 2):
            variant[place] = rng.choice(vocabulary)
        if 0.4 <= jaccard(trigrams(" ".join(text)), trigrams(" ".join(variant))) < 0.5:
            originals.append(" ".join(text))
            variants.append(" ".join(variant))
    index = NearDuplicates()
    index.add_all(originals)
    hits = sum(number - 2000 in near for number, near in index.add_all(variants))
    assert hits >= 0.99 * 2000  # expected 0.996, standard deviation 0.0014


def test_long_and_odd_prompts() -> None:
    long = " ".join(f"w{i}" for i in range(500))
    texts = ["", "!?", long, f"{long} more", f"a {long[:300]}", "ha " * 50, "ha " * 51, "好 好 好"]
    found = NearDuplicates().add_all(texts)
    assert found == [(0, []), (0, []), (1, []), (2, [1]), (3, []), (4, []), (5, [4]), (6, [])]


def test_what_was_removed_is_nobodys_near_duplicate() -> None:
    texts = [
        "why do nurses earn less than doctors do",
        "why do nurses earn less than doctors",
        "why do nurses earn less than most do",
    ]
    index = NearDuplicates()
    index.add_all([*texts[:2], *prompts(40)])
    index.remove(0)
    assert index.near(1) == []
    number, near = index.add(texts[2])
    assert near == [1]  # 8 trigrams less 2 of 11: the first six of nine and ten are shared
    assert index.add(texts[0]) == (number + 1, [1, number])  # it is new again
    index.remove(0)  # that number is long gone
    assert index.add(texts[0]) == (number + 1, [])
