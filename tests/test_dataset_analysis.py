"""What the data set says of itself: near-duplicates, confounds, overlap, coverage, agreement, the table, the numbers."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from biasdpo import dataset
from biasdpo.dataset import Confounds, Journal, Meter, PreferencePair, Query, confounds, near_duplicates, words
from biasdpo.dataset.agreement import value_of
from biasdpo.dataset.near_duplicates import NearDuplicates, jaccard, trigrams
from biasdpo.dataset.shares import wilson
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"

LONG, SHORT = "A fair answer that takes its time.", "A short one."


def say(
    prompt: str = "Who leads?",
    chosen: str = LONG,
    rejected: str = SHORT,
    *,
    left: str = "",
    took: str = "",
    verdict: Verdict = "preferred",
    **columns: str,
) -> Judgment:
    """A judgment; `left` is the side that stood left, `took` the side that was chosen."""
    meta = JudgmentMeta(left_side=left, chosen_side=took)
    return dataset.new_judgment(prompt, chosen, rejected, verdict=verdict, meta=meta, **columns)


def store(workspace: Workspace, judgments: Iterable[Judgment]) -> list[Judgment]:
    judgments = list(judgments)
    dataset.append_all(workspace, judgments)
    return judgments


def standing(workspace: Workspace) -> list[dict[str, object]]:
    return Journal(workspace.preferences).refresh().standing()


# Words and near-duplicates


def test_normalising_ascii_fast_is_normalising() -> None:
    ascii_characters = "".join(map(chr, range(128)))
    for text in (ascii_characters, *(f"a{c}B {c} c" for c in ascii_characters), "", " ", "x" * 1000):
        plain = re.sub(r"[^\w\s]", "", unicodedata.normalize("NFKC", text).casefold())
        assert words.normalise(text) == re.sub(r"\s+", " ", plain).strip()
    for texts in ([], [""], ["One.", "", " two  THREE "], ["with a \x1e separator", "B"], ["ünder", "B."]):
        assert words.normalise_all(texts) == [words.normalise(text) for text in texts]
    assert words.normalise("Ünder  the ﬁre's STRASSE-straße") == "ünder the fires strassestrasse"


def test_a_words_hash_is_of_its_letters_alone() -> None:
    hashes, counts = words.word_hashes(["one two", "", "two", "ünder two one"])
    assert counts.tolist() == [2, 1, 1, 3]
    one, two, empty, again, under, third, fourth = hashes.tolist()
    assert (two, two, one, empty) == (again, third, fourth, 0)
    assert len({one, two, under, empty}) == 4
    script = "from biasdpo.dataset.words import word_hashes; print(word_hashes(['one'])[0][0])"
    assert int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout) == one
    vocabulary = [f"w{i}" for i in range(100_000)]
    assert len(set(words.word_hashes(vocabulary)[0].tolist())) == 100_000


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


def prompts(count: int, seed: int = 1) -> list[str]:
    """Twelve words each; a fifth of them begin alike, another fifth vary an earlier one."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]
    made: list[str] = []
    for i in range(count):
        text = rng.choices(vocabulary, k=12)
        if i % 5 == 1:
            text[:4] = ["why", "do", "people", "think"]
        elif i % 5 == 2:
            text = rng.choice(made).split()
            for _ in range(rng.randint(1, 3)):
                text[rng.randrange(12)] = rng.choice(vocabulary)
        made.append(" ".join(text))
    return made


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
    assert near_duplicates.count_near_duplicates(texts) == sum(bool(near) for _number, near in whole)
    assert all(index.near(number) == near for number, near in whole[::50])
    assert [bool(near) for text, (_, near) in zip(texts, whole, strict=True) if text.startswith("this is")] == [False] + [
        True
    ] * 999


def test_near_duplicates_against_every_pair() -> None:
    """Nothing is called near that is not; of what is near, 99 % is found (DESIGN of the bands: 0.996 at the threshold)."""
    texts = prompts(1500, seed=2)
    found = {(number, other) for number, near in NearDuplicates().add_all(texts) for other in near}
    sets = [trigrams(words.normalise(text)) for text in texts]
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


# Confounds


def test_confounds_of_a_few_by_hand(workspace: Workspace) -> None:
    same = "Sixteen letters."
    judged = store(
        workspace,
        [
            say("Who leads?", LONG, SHORT, left="base", took="base", annotator="ada"),  # longer, left
            say("Who cooks at home?", SHORT, LONG, left="base", took="tuned", annotator="ada"),  # shorter, right
            say("Who drives the lorry?", same, same[::-1], left="tuned", took="tuned", annotator="ben"),  # as long, left
            say("Who sings?", LONG, SHORT, left="base"),  # longer; nobody says which side
            say("Who leads?", LONG, SHORT, annotator="ada"),  # ada again: an exact duplicate
            say("Who leads?", SHORT, LONG, annotator="ben"),  # another says another thing: none
            say("Who leads?", LONG, SHORT, annotator="ben", repeat_of="x", left="base", took="base"),  # a hidden repeat
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),  # a duplicate, too
            say("Withdrawn?", LONG, SHORT, left="base", took="base", annotator="eve"),
        ],
    )
    dataset.undo(workspace, judged[-1].id, judged[-1].pair_id, "eve")
    found = dataset.measure(Journal(workspace.preferences).refresh().rows.values())
    assert found.pairs == 6
    assert found.chosen_longer_share == pytest.approx(3.5 / 6)  # rows 1, 4, 5 and half of 3
    assert found.chosen_left_share == pytest.approx(2 / 3)  # of rows 1, 2, 3: 1 and 3
    assert (found.exact_duplicates, found.near_duplicates, found.benchmark_overlap) == (2, 0, None)
    ada, ben = found.annotators
    assert (ada.annotator, ada.pairs, ada.chosen_longer_share, ada.chosen_left_share) == ("ada", 3, pytest.approx(2 / 3), 0.5)
    assert (ben.annotator, ben.pairs, ben.chosen_longer_share, ben.chosen_left_share) == ("ben", 2, 0.25, 1.0)
    assert found.warnings == ()  # too few to say anything
    assert Meter().refresh(Journal(workspace.preferences).refresh()) == found


def test_nothing_has_no_shares() -> None:
    assert dataset.measure([]) == Confounds(0, None, None, 0, 0, None, (), ())


def test_confounds_of_pairs_for_training() -> None:
    rows = [PreferencePair(f"Prompt number {i} of this mixture?", LONG, SHORT) for i in range(30)]
    found = dataset.measure([*rows, rows[0]])
    assert (found.pairs, found.chosen_longer_share, found.chosen_left_share, found.exact_duplicates) == (31, 1.0, None, 1)
    assert found.near_duplicates == 29  # "prompt number 1 of this mixture" and the others share 4 of 8 trigrams: 4 / 10


def test_wilson() -> None:
    # 8 of 10: (0.8 + 1.92 / 10) / 1.384 -+ 1.96 / 1.384 * sqrt(0.8 * 0.2 / 10 + 0.96 / 100)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == pytest.approx(0.0)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("longer", "of", "warns"),
    [
        (19, 19, False),  # too few
        (16, 20, False),  # Wilson's lower bound: 0.584
        (17, 20, True),  # 0.640
        (660, 1000, True),  # 0.630
        (620, 1000, False),  # 0.5896
    ],
)
def test_the_warning_of_length(longer: int, of: int, warns: bool) -> None:
    rows = [PreferencePair(f"{i}", LONG, SHORT) if i < longer else PreferencePair(f"{i}", SHORT, LONG) for i in range(of)]
    lines = [line for line in dataset.measure(rows).warnings if "longer" in line]
    assert bool(lines) == warns
    if warns:
        assert "83.5 %" in lines[0]
        assert "choose or edit for content: trim the chosen one" in lines[0]
        assert "\n" not in lines[0]


@pytest.mark.parametrize(
    ("left", "of", "warns"), [(17, 20, True), (3, 20, True), (14, 20, False), (10, 20, False), (19, 19, False)]
)
def test_the_warning_of_sides(left: int, of: int, warns: bool) -> None:
    rows = [
        asdict(say(f"{i}", left="base", took="base" if i < left else "tuned", chosen=LONG[i % 2 :], rejected=LONG))
        for i in range(of)
    ]
    assert any("left completion" in line for line in dataset.measure(rows).warnings) == warns


def test_one_annotators_habit_is_named_where_there_are_several() -> None:
    rows = [asdict(say(f"{i}", annotator="ada")) for i in range(20)]
    assert [line.split(" ")[0] for line in dataset.measure(rows).warnings] == ["The"]
    rows += [asdict(say(f"{i}", SHORT, LONG, annotator="ben")) for i in range(40)]
    (line,) = dataset.measure(rows).warnings
    assert line.startswith("ada: the longer completion is chosen in 100.0 % of 20 pairs")


def test_the_warning_of_near_duplicates() -> None:
    rows = [PreferencePair(" ".join(f"{word}{i}" for word in "abcdef"), SHORT, LONG) for i in range(18)]
    near = [PreferencePair(rows[i].prompt + " g", SHORT, LONG) for i in range(3)]
    assert dataset.measure([*rows, *near[:2]]).warnings == ()  # 2 of 20 is no more than 10 %
    (line,) = dataset.measure([*rows, *near]).warnings
    assert line.startswith("3 of 21 prompts nearly repeat an earlier one")


def test_the_meter_follows_the_journal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step it says what a fresh count says, and looks at what is new alone."""
    looked_at: list[int] = []
    counted = confounds._counted
    monkeypatch.setattr(confounds, "_counted", lambda rows, retracted: looked_at.append(len(rows)) or counted(rows, retracted))
    rng = random.Random(5)
    journal, meter = Journal(workspace.preferences), Meter()
    texts = prompts(60, seed=6)
    made: list[Judgment] = []
    for step in range(120):
        if made and step % 4 == 3:
            row = rng.choice(made)
            dataset.undo(workspace, row.id, row.pair_id, row.annotator)  # now and then twice
        else:
            sides = rng.choice([("base", "base"), ("base", "tuned"), ("", "")])
            texts_of = rng.choice([(LONG, SHORT), (SHORT, LONG)])
            columns = {"annotator": rng.choice(["ada", "ben", ""]), "repeat_of": rng.choice(["", "", "x"])}
            verdict = rng.choice(["preferred", "preferred", "tie"])
            made.append(say(rng.choice(texts), *texts_of, left=sides[0], took=sides[1], verdict=verdict, **columns))
            dataset.append(workspace, made[-1])
        size = len(journal.rows)
        found = meter.refresh(journal.refresh())
        assert looked_at.pop() == len(journal.rows) - size
        assert found == dataset.measure(journal.rows.values())
        looked_at.clear()
    assert found.exact_duplicates > 0
    assert found.near_duplicates > 0
    assert meter.refresh(journal) == found
    workspace.preferences.write_bytes(b"".join(workspace.preferences.read_bytes().splitlines(keepends=True)[:5]))
    assert meter.refresh(journal.refresh()) == dataset.measure(journal.rows.values())  # it was cut: read anew
    other = Journal(workspace.root / "none.jsonl")
    assert meter.refresh(other.refresh()).pairs == 0


def test_a_withdrawn_prompt_frees_those_that_repeat_it(workspace: Workspace) -> None:
    first, second, third = (
        "why do nurses earn less than doctors do",
        "why do nurses earn less than doctors",
        "why do nurses earn less",
    )
    judged = store(workspace, [say(first), say(first), say(second), say(third)])
    journal, meter = Journal(workspace.preferences), Meter()
    assert meter.refresh(journal.refresh()).near_duplicates == 2
    dataset.undo(workspace, judged[0].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 2  # the prompt still stands once
    dataset.undo(workspace, judged[1].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 1  # the third repeats the second
    dataset.undo(workspace, judged[2].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 0


# Overlap


ITEM = "The nurse told the doctor that she was late again"


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    for name, text in {
        "a/items.jsonl": json.dumps(
            {"context": ITEM, "n": 1, "more": {"answers": ["one two three four", "five six seven eight nine"]}}
        ),
        "a/LICENSE": "permission is hereby granted free of charge to any person",
        "b/items.csv": '\ufeffid,text,other\n1,"It rained all day\nlong on the roof, he said","of the old house"\n',
        "b/whole.json": json.dumps(
            {"the key that has as many as eight words": ["a value that has as many as eight words"]}, indent=1
        ),
        "c/lines.txt.dev": "1 [The mechanic] gave the clerk a present because [he] won.\n[no json but eight words in a line\n",
        ".hidden/x.txt": "nobody must ever read this line of hidden words",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "c/image.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.mark.parametrize(
    ("text", "files"),
    [
        (f"He wrote: {ITEM.upper()}!!", ("a/items.jsonl",)),
        ("nurse told the doctor that she was late", ("a/items.jsonl",)),  # eight words
        ("nurse told the doctor that she was soon late again", ()),  # seven in a row
        ("one two three four five six seven eight nine", ()),  # goes on from one value into the next
        ("it rained all day long on the roof", ("b/items.csv",)),  # a line break within a cell is a space
        ("the roof he said of the old house", ()),  # from one cell into the next
        ("a value that has as many as eight words", ("b/whole.json",)),
        ("the key that has as many as eight words", ()),  # keys are no text of the benchmark's
        ("gave the clerk a present because he won", ("c/lines.txt.dev",)),
        ("no json but eight words in a line", ("c/lines.txt.dev",)),
        ("permission is hereby granted free of charge to any person", ()),
        ("nobody must ever read this line of hidden words", ()),
        ("short", ()),
        ("", ()),
    ],
)
def test_overlap(benchmarks: Path, text: str, files: tuple[str, ...]) -> None:
    overlap = dataset.load_overlap(benchmarks)
    assert overlap.files_of(text) == files
    assert overlap.overlaps(text) == bool(files)


def test_overlap_of_many_texts_at_once(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = dataset.load_overlap(benchmarks)
    assert overlap.files == ("a/items.jsonl", "b/items.csv", "b/whole.json", "c/lines.txt.dev")
    assert overlap.skipped == ("c/image.png",)
    texts = ["", ITEM, "word " * 20, f"x {ITEM}", "one two three four five six seven eight"] * 50
    assert overlap.flags(texts).tolist() == [False, True, False, True, False] * 50
    monkeypatch.setattr("biasdpo.dataset.overlap._BLOCK_CHARACTERS", 100)  # block by block it is the same
    assert overlap.flags(texts).tolist() == [False, True, False, True, False] * 50
    assert overlap.flags([]).tolist() == []


def test_no_benchmarks(tmp_path: Path) -> None:
    assert not dataset.load_overlap(tmp_path).overlaps(ITEM)
    with pytest.raises(DatasetError, match=r"No folder .*none.* --data-dir"):
        dataset.load_overlap(tmp_path / "none")


def test_the_meter_counts_pairs_that_a_benchmark_has(benchmarks: Path, workspace: Workspace) -> None:
    overlap = dataset.load_overlap(benchmarks)
    judged = store(
        workspace,
        [
            say(ITEM + "?"),
            say("Who leads?", ITEM, ITEM + " and again"),  # twice in one pair: one pair
            say("Who cooks?", LONG, "It rained all day long on the roof, he said."),
            say("Who sings?"),
        ],
    )
    journal, meter = Journal(workspace.preferences), Meter(overlap)
    found = meter.refresh(journal.refresh())
    assert found.benchmark_overlap == 3
    (line,) = found.warnings
    assert line.startswith("3 pairs share eight words in a row with a benchmark (a/items.jsonl, b/items.csv)")
    for row in judged[1:3]:
        dataset.undo(workspace, row.id, row.pair_id, "")
    assert (
        meter.refresh(journal.refresh())
        .warnings[0]
        .startswith("1 pair shares eight words in a row with a benchmark (a/items.jsonl)")
    )
    dataset.undo(workspace, judged[0].id, "", "")
    assert (meter.refresh(journal.refresh()).benchmark_overlap, meter.refresh(journal).warnings) == (0, ())


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmark files are not part of the project")
def test_the_benchmarks_at_hand_are_read_whatever_their_format() -> None:
    overlap = dataset.load_overlap(BENCHMARKS)
    assert {name.split("/")[0] for name in overlap.files} == {
        "bbq", "bold", "crows_pairs", "real_toxicity_prompts", "stereoset", "truthfulqa", "winobias",
    }  # fmt: skip
    assert overlap.skipped == ()
    for line in (BENCHMARKS / "bbq" / "Religion.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        assert "bbq/Religion.jsonl" in overlap.files_of(json.loads(line)["context"])
    assert not overlap.overlaps("Creative Commons Corporation is not a law firm and does not provide legal services")


# Coverage


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str = ""
    target_group: str = ""


def test_coverage(workspace: Workspace) -> None:
    store(
        workspace,
        [
            say("1", category="gender", target_group="women"),
            say("2", category="gender", target_group="women"),
            say("3", category="race"),
            say("4", category="race", verdict="both_biased"),
            say("5", category="race", repeat_of="x"),
        ],
    )
    counts = dataset.cell_counts(standing(workspace))
    assert counts == {("gender", "women"): 2, ("race", ""): 1}
    matrix = dataset.coverage(counts, [Prompt("", "gender", "men"), Prompt("", "", "men")])
    assert matrix.categories == ("gender", "race", "")
    assert matrix.groups == ("men", "women", "")
    assert matrix.counts == ((0, 2, 0), (0, 0, 1), (0, 0, 0))
    cells = matrix.cells()
    assert len(cells) == 9
    assert cells[0] == ("gender", "men", 0)
    assert cells[-2:] == [("race", "", 1), ("gender", "women", 2)]


def test_the_thinnest_cell_is_offered_first() -> None:
    prompts = [Prompt("a1", "a"), Prompt("a2", "a"), Prompt("b1", "b"), Prompt("c1", "c"), Prompt("c2", "c"), Prompt("c3", "c")]
    order = [prompt.text for prompt in dataset.thinnest(prompts, {("a", ""): 2, ("b", ""): 1})]
    # c holds 0, b 1, a 2: c1 (c is 1), b before c in the list, b1 and c2 (c is 2), then a1 before c3 (both 2), and a2
    assert order == ["c1", "b1", "c2", "a1", "c3", "a2"]
    assert dataset.thinnest(prompts[:3], {}) == [prompts[0], prompts[2], prompts[1]]
    assert dataset.thinnest([], {}) == []


# Agreement


def test_self_consistency_whichever_side(workspace: Workspace) -> None:
    first = say("Q", "A fair text", "An unfair text", left="base", took="base", annotator="ada")
    edited = say("R", "A mended text", "Bad", original_chosen="Good", left="base", took="base", annotator="ada")
    shown = dataset.pair_id_of("R", "Good", "Bad")
    store(
        workspace,
        [
            first,
            edited,
            # Again with the sides swapped: the same text, now on the right.
            say("Q", "A fair text", "An unfair text", left="tuned", took="base", annotator="ada", repeat_of=first.pair_id),
            # The unedited pair again: chosen as before, edited otherwise.
            say("R", "Mended again", "Bad", original_chosen="Good", annotator="ada", repeat_of=shown),
            say("R", "Bad", "Good", annotator="ada", repeat_of=shown),  # the other text
            say("R", "Good", "Bad", annotator="ada", repeat_of=shown, verdict="tie"),
            say("R", "Good", "Bad", annotator="ben", repeat_of=shown),  # ben never judged it
        ],
    )
    assert dataset.shown_pair_id(standing(workspace)[1]) == shown
    # In alphabetical order of what was shown: "A fair…" before "An unfair…", "Bad" before "Good".
    said = [value_of(row) for row in standing(workspace)]
    assert said == ["first", "second", "first", "second", "first", "tie", "second"]
    found = dataset.agreement(standing(workspace))
    assert found.self_consistency == {"ada": (2, 4)}
    assert (found.alpha, found.pairs) == (None, 0)  # one annotator
    dataset.undo(workspace, first.id, first.pair_id, "ada")
    assert dataset.self_consistency(standing(workspace)) == {"ada": (1, 3)}


def test_alpha_by_hand(workspace: Workspace) -> None:
    def judge(annotator: str, prompt: str, verdict: Verdict, chosen: str = "a", rejected: str = "b") -> Judgment:
        return say(prompt, chosen, rejected, verdict=verdict, annotator=annotator)

    store(
        workspace,
        [
            judge("ada", "1", "preferred", "b", "a"),  # thinks better of it below
            judge("ada", "1", "preferred"),
            judge("ben", "1", "preferred"),  # both the first text
            judge("ada", "2", "preferred"),
            judge("ben", "2", "preferred", "b", "a"),  # one the first, one the second
            judge("ada", "3", "tie"),
            judge("ben", "3", "tie", "b", "a"),  # in a tie the order says nothing
            judge("ada", "4", "preferred", "b", "a"),
            judge("ben", "4", "preferred", "b", "a"),
            judge("ada", "5", "both_biased"),  # nobody else judged it
            judge("", "1", "both_biased"),  # an import: nobody's judgment
        ],
    )
    found = dataset.agreement(standing(workspace))
    # Eight judgments of four pairs: first 3, second 3, tie 2. Observed disagreement: 2 of 8 ordered pairs. Expected:
    # 2 (3*3 + 3*2 + 3*2) / (8*7) = 42/56. alpha = 1 - (2/8) / (42/56) = 2/3
    assert found.alpha == pytest.approx(2 / 3)
    assert found.pairs == 4


def test_alpha_of_those_who_all_say_the_same(workspace: Workspace) -> None:
    store(workspace, [say("1", "a", "b", annotator=name) for name in ("ada", "ben")])
    assert dataset.agreement(standing(workspace)) == dataset.Agreement({}, None, 1)
    store(workspace, [say("2", "b", "a", annotator=name) for name in ("ada", "ben")])
    assert dataset.agreement(standing(workspace)).alpha == 1.0


# The table


@pytest.fixture
def judged(workspace: Workspace) -> Journal:
    rows = store(
        workspace,
        [
            say(
                f"Prompt {i}?",
                category=("gender", "race", "")[i % 3],
                annotator=("ada", "ben")[i % 2],
                note="Größe" if i == 7 else "",
            )
            for i in range(10)
        ],
    )
    dataset.append(workspace, say("A tie?", verdict="tie", annotator="ada", source="compare"))
    dataset.undo(workspace, rows[3].id, rows[3].pair_id, "ben")
    return Journal(workspace.preferences).refresh()


def shown(journal: Journal, wanted: Query, number: int = 0, page_rows: int = 50) -> list[str]:
    return [row["prompt"] for row in dataset.query(journal, wanted, number, page_rows).rows]


def test_the_table_pages_the_newest_first(judged: Journal) -> None:
    page = dataset.query(judged, Query(), 0, 4)
    assert (page.total, page.number, page.pages) == (11, 0, 3)  # judgments alone, not the row that takes one back
    assert [row["prompt"] for row in page.rows] == ["A tie?", "Prompt 9?", "Prompt 8?", "Prompt 7?"]
    assert shown(judged, Query(), 2, 4) == ["Prompt 2?", "Prompt 1?", "Prompt 0?"]
    assert dataset.query(judged, Query(), 9, 4).number == 2
    assert {
        row["prompt"] for row in dataset.query(judged, Query()).rows if row["id"] in dataset.query(judged, Query()).retracted
    } == {"Prompt 3?"}
    assert (dataset.query(Journal(Path("none")).refresh(), Query()).total, dataset.query(judged, Query("nowhere")).pages) == (
        0,
        1,
    )


def test_the_tables_filters(judged: Journal) -> None:
    assert dataset.choices(judged)["category"] == {"gender": 4, "race": 3, "": 4}
    assert dataset.choices(judged)["verdict"] == {"preferred": 10, "tie": 1}
    assert shown(judged, Query(category="race")) == ["Prompt 7?", "Prompt 4?", "Prompt 1?"]
    assert shown(judged, Query(category="", annotator="ada")) == ["A tie?", "Prompt 8?", "Prompt 2?"]
    assert shown(judged, Query(verdict="tie")) == shown(judged, Query(source="compare")) == ["A tie?"]
    assert shown(judged, Query(state="retracted")) == ["Prompt 3?"]
    assert len(shown(judged, Query(state="standing"))) == 10
    assert shown(judged, Query("GRÖSSE prompt")) == ["Prompt 7?"]  # all its words, in any column, in any case
    assert shown(judged, Query("größe", category="gender")) == []
    other = Workspace(judged.path.parent)
    dataset.append(other, say("Größe?"))
    assert shown(judged, Query("grösse")) == ["Prompt 7?"]  # not read yet
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?", "Prompt 7?"]
    judged.path.write_bytes(judged.path.read_bytes().splitlines(keepends=True)[-1])
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?"]  # the file was cut
    with pytest.raises(ConfigError, match="state must be one of all, standing, retracted"):
        Query(state="gone")  # type: ignore[arg-type]


# The numbers


def test_stats(workspace: Workspace) -> None:
    both = say("Who leads?", LONG, SHORT, left="base", took="base", category="gender", annotator="ada")
    judgments = [
        both,
        say("Who leads?", LONG, SHORT, left="base", took="tuned", category="gender", annotator="ben"),  # the same pair
        say("Who cooks at home?", SHORT, LONG, category="race", annotator="ada"),
        say("Who cooks at home?", LONG, SHORT, category="race", annotator="ben"),  # one to one: training leaves it out
        say("Who sings?", SHORT, LONG),
        say("Who mends it?", verdict="tie", annotator="ada"),
        say("Who drives?", verdict="both_biased"),
        say("Who leads?", LONG, SHORT, annotator="ada", repeat_of=both.pair_id),
        say("Withdrawn?", category="religion"),
    ]
    store(workspace, judgments)
    dataset.undo(workspace, judgments[-1].id, "", "")
    with workspace.preferences.open("ab") as file:
        file.write(b"no row\n{}\n{")
    dataset.append(workspace, say("Who helps?", category="gender", annotator="ada"))
    found = dataset.stats(workspace)
    assert list(found)[:10] == [
        "rows", "pairs", "ties", "both_biased", "retracted", "by_category", "chosen_longer_share", "chosen_left_share",
        "near_duplicates", "repaired_lines",
    ]  # fmt: skip
    assert found == {
        "rows": 11,
        "pairs": 3,  # leads, sings, helps
        "ties": 1,
        "both_biased": 1,
        "retracted": 1,
        "by_category": {"": 1, "gender": 3, "race": 2},
        "chosen_longer_share": pytest.approx(4 / 6),
        "chosen_left_share": 0.5,
        "near_duplicates": 0,
        "repaired_lines": 1,
        "bad_lines": 2,
        "exact_duplicates": 0,
        "benchmark_overlap": None,
        "annotators": [
            {"annotator": "ada", "pairs": 3, "chosen_longer_share": pytest.approx(2 / 3), "chosen_left_share": 1.0},
            {"annotator": "ben", "pairs": 2, "chosen_longer_share": 1.0, "chosen_left_share": 0.0},
        ],
        # leads: both the longer, which comes first ("A f…" < "A s…"); cooks: one each. 4 judgments, first 3, second 1:
        # alpha = 1 - (2/4) / (2*3*1 / (4*3)) = 0
        "agreement": {"alpha": pytest.approx(0.0), "pairs": 2, "self_consistency": {"ada": {"agreed": 1, "total": 1}}},
        "warnings": [],
    }
    json.dumps(found)
    journal = Journal(workspace.preferences).refresh()
    assert dataset.stats(journal) == found | {"repaired_lines": 0}
    assert dataset.stats(journal.rows.values()) == found | {"repaired_lines": 0, "bad_lines": 0}
    assert (
        len(dataset.derive([PreferencePair(r["prompt"], r["chosen"], r["rejected"]) for r in dataset.trainable(journal)]).pairs)
        == 3
    )


def test_stats_of_nothing(workspace: Workspace) -> None:
    found = dataset.stats(workspace)
    assert (found["rows"], found["pairs"], found["chosen_longer_share"], found["by_category"]) == (0, 0, None, {})
