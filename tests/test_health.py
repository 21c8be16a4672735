"""Data health: confounds by hand, the thresholds of warnings, near-duplicates against every pair, overlap with benchmarks."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pytest

from biasdpo.data import health
from biasdpo.data.health import Confounds, Meter, load_overlap, measure, wilson
from biasdpo.data.journal import Journal, append, undo
from biasdpo.data.near_duplicates import NearDuplicates, normalize
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import DatasetError
from biasdpo.records import Judgment
from biasdpo.workspace import Workspace
from tests.judging import LONG, SHORT, prompts, say, store

BENCHMARKS = Path(__file__).resolve().parents[2] / "shared" / "benchmarks"

# Confounds


def test_confounds_by_hand(workspace: Workspace) -> None:
    same = "Sixteen letters."
    judged = store(
        workspace,
        [
            say("Who leads?", LONG, SHORT, left="base", took="base", annotator="ada"),  # longer, left
            say("Who cooks at home?", SHORT, LONG, left="base", took="tuned", annotator="ada"),  # shorter, right
            say("Who drives the lorry?", same, same[::-1], left="tuned", took="tuned", annotator="ben"),  # as long, left
            say("Who sings?", LONG, SHORT, left="base"),  # longer; the chosen side is not recorded
            say("Who leads?", LONG, SHORT, annotator="ada"),  # ada again: an exact duplicate
            say("Who leads?", SHORT, LONG, annotator="ben"),  # another annotator disagrees: not a duplicate
            say("Who leads?", LONG, SHORT, annotator="ben", repeat_of="x", left="base", took="base"),  # a hidden repeat
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),  # a duplicate, too
            say("Withdrawn?", LONG, SHORT, left="base", took="base", annotator="eve"),
        ],
    )
    undo(workspace, judged[-1].id, judged[-1].pair_id, "eve")
    found = measure(Journal(workspace.preferences).refresh().rows.values())
    assert found.pairs == 6
    assert found.chosen_longer_share == pytest.approx(3.5 / 6)  # rows 1, 4, 5 and half of 3
    assert found.chosen_left_share == pytest.approx(2 / 3)  # of rows 1, 2, 3: 1 and 3
    assert (found.exact_duplicates, found.near_duplicates, found.benchmark_overlap) == (2, 0, None)
    ada, ben = found.annotators
    assert (ada.annotator, ada.pairs, ada.chosen_longer_share, ada.chosen_left_share) == ("ada", 3, pytest.approx(2 / 3), 0.5)
    assert (ben.annotator, ben.pairs, ben.chosen_longer_share, ben.chosen_left_share) == ("ben", 2, 0.25, 1.0)
    assert found.warnings == ()  # too few to say anything
    assert Meter().refresh(Journal(workspace.preferences).refresh()) == found
    assert measure([]) == Confounds(0, None, None, 0, 0, None, (), ())


def test_confounds_of_training_pairs() -> None:
    rows = [PreferencePair(f"Prompt number {i} of this mixture?", LONG, SHORT) for i in range(30)]
    found = measure([*rows, rows[0]])
    assert (found.pairs, found.chosen_longer_share, found.chosen_left_share, found.exact_duplicates) == (31, 1.0, None, 1)
    assert found.near_duplicates == 29  # "prompt number 1 of this mixture" and the others share 4 of 10 trigrams


def test_templated_pairs_are_said() -> None:
    (line,) = measure([PreferencePair("[INST] Who? [/INST]", "A.", "B."), PreferencePair("Who?", "A.", "B.")]).warnings
    assert line.startswith("A chat template's markers ([INST]) are in 1 of 2 pairs and")


def test_wilson() -> None:
    # 8 of 10: (0.8 + 1.92 / 10) / 1.384 -+ 1.96 / 1.384 * sqrt(0.8 * 0.2 / 10 + 0.96 / 100)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == pytest.approx(0.0)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("longer", "of", "warns"),
    # Too few; Wilson's lower bounds 0.584, 0.640, 0.630 and 0.5896
    [(19, 19, False), (16, 20, False), (17, 20, True), (660, 1000, True), (620, 1000, False)],
)
def test_the_warning_of_length(longer: int, of: int, warns: bool) -> None:
    rows = [PreferencePair(f"{i}", LONG, SHORT) if i < longer else PreferencePair(f"{i}", SHORT, LONG) for i in range(of)]
    lines = [line for line in measure(rows).warnings if "longer" in line]
    assert bool(lines) == warns
    assert all("Prefer pairs of similar length" in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("left", "of", "warns"), [(17, 20, True), (3, 20, True), (14, 20, False), (10, 20, False), (19, 19, False)]
)
def test_the_warning_of_sides(left: int, of: int, warns: bool) -> None:
    rows = [
        asdict(say(f"{i}", left="base", took="base" if i < left else "tuned", chosen=LONG[i % 2 :], rejected=LONG))
        for i in range(of)
    ]
    assert any("left answer" in line for line in measure(rows).warnings) == warns


def test_an_annotators_habit_is_named_if_there_are_several() -> None:
    rows = [asdict(say(f"{i}", annotator="ada")) for i in range(20)]
    assert [line.split(" ")[0] for line in measure(rows).warnings] == ["Chosen"]
    rows += [asdict(say(f"{i}", SHORT, LONG, annotator="ben")) for i in range(40)]
    (line,) = measure(rows).warnings
    assert line.startswith("ada chose the longer answer in 100% of 20 pairs")


def test_the_warning_of_near_duplicates() -> None:
    rows = [PreferencePair(" ".join(f"{word}{i}" for word in "abcdef"), SHORT, LONG) for i in range(18)]
    near = [PreferencePair(rows[i].prompt + " g", SHORT, LONG) for i in range(3)]
    assert measure([*rows, *near[:2]]).warnings == ()  # 2 of 20 is not more than 10 %
    (line,) = measure([*rows, *near]).warnings
    assert line.startswith("3 of 21 prompts nearly repeat an earlier one and add little. Write")


def test_the_meter_follows_the_journal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step it equals a fresh count; without a withdrawal, it looks only at what is new."""
    looked_at: list[int] = []
    counted = health._counted
    monkeypatch.setattr(health, "_counted", lambda rows, retracted: looked_at.append(len(rows)) or counted(rows, retracted))
    rng = random.Random(5)
    journal, meter = Journal(workspace.preferences), Meter()
    texts = prompts(60, seed=6)
    made: list[Judgment] = []
    for step in range(80):
        withdraws = bool(made) and step % 4 == 3
        if withdraws:
            row = rng.choice(made)
            undo(workspace, row.id, row.pair_id, row.annotator)  # now and then twice
        else:
            sides = rng.choice([("base", "base"), ("base", "tuned"), ("", "")])
            texts_of = rng.choice([(LONG, SHORT), (SHORT, LONG)])
            columns = {"annotator": rng.choice(["ada", "ben", ""]), "repeat_of": rng.choice(["", "", "x"])}
            verdict = rng.choice(["preferred", "preferred", "tie"])
            made.append(say(rng.choice(texts), *texts_of, left=sides[0], took=sides[1], verdict=verdict, **columns))
            append(workspace, made[-1])
        size = len(journal.rows)
        found = meter.refresh(journal.refresh())
        assert withdraws or looked_at == [len(journal.rows) - size]
        assert found == measure(journal.rows.values())
        looked_at.clear()
    assert found.exact_duplicates > 0
    assert found.near_duplicates > 0
    assert meter.refresh(journal) == found
    workspace.preferences.write_bytes(b"".join(workspace.preferences.read_bytes().splitlines(keepends=True)[:5]))
    assert meter.refresh(journal.refresh()) == measure(journal.rows.values())  # the file was cut: read anew
    assert meter.refresh(Journal(workspace.root / "none.jsonl").refresh()).pairs == 0


# Near-duplicates


def test_normalize() -> None:
    characters = "".join(map(chr, range(128)))
    for text in (characters, *(f"a{c}B {c} c" for c in characters), "", " ", "x" * 1000):  # the fast path of ASCII
        plain = re.sub(r"[^\w\s]", "", unicodedata.normalize("NFKC", text).casefold())
        assert normalize(text) == re.sub(r"\s+", " ", plain).strip()
    assert normalize("Ünder  the ﬁre's STRASSE-straße") == "ünder the fires strassestrasse"


Grams = frozenset[tuple[str, ...]]


def trigrams(prompt: str) -> Grams:
    words = ["", "", *normalize(prompt).split(" "), "", ""]
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def jaccard(one: Grams, other: Grams) -> float:
    return len(one & other) / len(one | other)


def test_jaccard_of_trigrams() -> None:
    # "", "", a, b, c, "", "" has 5 trigrams; with d for c the first two ("", "", a and "", a, b) are shared: 2 / (5 + 5 - 2)
    assert jaccard(trigrams("a b c"), trigrams("a b d")) == 0.25
    one, other = "why do nurses earn less than doctors do", "why do nurses earn less than doctors"
    assert jaccard(trigrams(one), trigrams(other)) == pytest.approx(7 / 12)  # 10 and 9 trigrams, the first 7 shared
    found = NearDuplicates().add_all([one, other, other.upper() + "?", "a b c", "a b d"])
    assert found == [(0, []), (1, [0]), (1, []), (2, []), (3, [])]


def test_long_and_odd_prompts() -> None:
    long = " ".join(f"w{i}" for i in range(500))
    texts = ["", "!?", long, f"{long} more", f"a {long[:300]}", "ha " * 50, "ha " * 51, "好 好 好"]
    found = NearDuplicates().add_all(texts)
    assert found == [(0, []), (0, []), (1, []), (2, [1]), (3, []), (4, []), (5, [4]), (6, [])]


def test_near_duplicates_against_every_pair() -> None:
    """Nothing is called near that is not, 99 % of what is near is found, and the same one by one."""
    texts = prompts(1500, seed=2)
    whole = NearDuplicates().add_all(texts)
    found = {(number, other) for number, near in whole for other in near}
    sets = list(map(trigrams, texts))
    true = {(i, j) for i in range(len(sets)) for j in range(i) if sets[i] & sets[j] and jaccard(sets[i], sets[j]) >= 0.4}
    assert len(true) > 200
    assert found <= true
    assert len(found) >= 0.99 * len(true)
    index = NearDuplicates()
    assert [index.add_all([text])[0] for text in texts[:400]] == whole[:400]
    assert index.add_all(texts[400:]) == whole[400:]


def test_near_duplicates_are_those_of_version_0_1() -> None:
    """Runs of 0.1 have no stored split, so that theirs is derived again: of templates, of random prompts and of long ones."""
    texts = [f"this is number {i} of many that differ in one word or two {i}" for i in range(1000)] + prompts(2000)
    texts += [" ".join(f"w{i}" for i in range(start, 500)) for start in range(9)]
    found = NearDuplicates().add_all(texts)
    assert [bool(near) for _number, near in found[:1000]] == [False] + [True] * 999
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest == "e862c9c0749372c6a57dbc91fcc6d044206314da8654e9314bbc0bcff45dc752"


# Overlap

ITEM = "The nurse told the doctor that she was late again"


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    answers = ["one two three four", "five six seven eight nine"]
    deep = '{"a":' * 1020 + '"a line that is nested a thousand levels deep"' + "}" * 1020
    for name, text in {
        "a/items.jsonl": json.dumps({"context": ITEM, "n": 1, "more": {"answers": answers}}) + "\n" + deep,
        "a/LICENSE": "permission is hereby granted free of charge to any person",
        "b/items.csv": '\ufeffid,text,other\n1,"It rained all day\nlong on the roof, he said","of the old house"\n',
        "b/whole.json": json.dumps({"the key that has as many as eight words": ["a value that has as many as eight words"]}),
        "c/lines.txt.dev": "1 [The mechanic] gave the clerk a present because [he] won.\n[no json but eight words in a line\n",
        ".hidden/x.txt": "nobody must ever read this line of hidden words",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "c/image.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


def test_overlap(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = load_overlap(benchmarks)
    assert overlap.files == ("a/items.jsonl", "b/items.csv", "b/whole.json", "c/lines.txt.dev")
    assert overlap.skipped == ("c/image.png",)
    expected = {
        f"He wrote: {ITEM.upper()}!!": ("a/items.jsonl",),
        "nurse told the doctor that she was late": ("a/items.jsonl",),  # eight words
        "a line that is nested a thousand levels deep": ("a/items.jsonl",),
        "nurse told the doctor that she was soon late again": (),  # seven in a row
        "one two three four five six seven eight nine": (),  # from one value into the next
        "it rained all day long on the roof": ("b/items.csv",),  # a line break within a cell is a space
        "the roof he said of the old house": (),  # from one cell into the next
        "a value that has as many as eight words": ("b/whole.json",),
        "the key that has as many as eight words": (),  # keys are not text of the benchmark
        "gave the clerk a present because he won": ("c/lines.txt.dev",),
        "no json but eight words in a line": ("c/lines.txt.dev",),
        "permission is hereby granted free of charge to any person": (),
        "nobody must ever read this line of hidden words": (),
        "short": (),
        "": (),
    }
    shared = {i: set(files) for i, files in enumerate(expected.values()) if files}
    assert overlap.files_of(list(expected)) == shared
    monkeypatch.setattr(health, "_TEXTS_AT_ONCE", 2)  # block by block it is the same
    assert overlap.files_of(list(expected)) == shared
    assert overlap.files_of([]) == {}


def test_no_benchmarks(tmp_path: Path) -> None:
    assert load_overlap(tmp_path).files_of([ITEM]) == {}
    with pytest.raises(DatasetError, match=r"No folder .*none.* --data-dir"):
        load_overlap(tmp_path / "none")


def test_the_meter_counts_pairs_that_overlap(benchmarks: Path, workspace: Workspace) -> None:
    judged = store(
        workspace,
        [
            say(ITEM + "?"),
            say("Who leads?", ITEM, ITEM + " and again"),  # twice in one pair: one pair
            say("Who cooks?", LONG, "It rained all day long on the roof, he said."),
            say("Who sings?"),
        ],
    )
    journal, meter = Journal(workspace.preferences), Meter(load_overlap(benchmarks))
    found = meter.refresh(journal.refresh())
    assert found.benchmark_overlap == 3
    assert found.warnings[0].startswith("3 pairs share eight consecutive words with a benchmark (a/items.jsonl, b/items.csv)")
    for row in judged[1:3]:
        undo(workspace, row.id, row.pair_id, "")
    found = meter.refresh(journal.refresh())
    assert found.warnings[0].startswith("1 pair shares eight consecutive words with a benchmark (a/items.jsonl)")
    undo(workspace, judged[0].id, "", "")
    assert (meter.refresh(journal.refresh()).benchmark_overlap, meter.refresh(journal).warnings) == (0, ())


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmark files are not part of the project")
def test_the_benchmarks_at_hand_are_read_whatever_their_format() -> None:
    overlap = load_overlap(BENCHMARKS)
    names = {"bbq", "bold", "crows_pairs", "real_toxicity_prompts", "stereoset", "truthfulqa", "winobias"}
    assert {name.split("/")[0] for name in overlap.files} == names
    assert overlap.skipped == ()
    lines = (BENCHMARKS / "bbq" / "Religion.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    found = overlap.files_of([json.loads(line)["context"] for line in lines])
    assert len(found) == 20
    assert all("bbq/Religion.jsonl" in files for files in found.values())
    assert overlap.files_of(["Creative Commons Corporation is not a law firm and does not provide legal services"]) == {}
