"""Reading items: upstream's formats and the Hub's schemas, and one line for each fault. All rows are our own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from biasdpo import benchmarks
from biasdpo.benchmarks import bbq, rows, stereoset
from biasdpo.errors import ConfigError, DatasetError
from tests.evaluating import write_files as write

BBQ_ROW = {
    "question_polarity": "neg",
    "context_condition": "ambig",
    "category": "Nationality",
    "answer_info": {"ans0": ["German", "Europe"], "ans1": ["Not known", "unknown"], "ans2": ["Omani", "ArabStates"]},
    "additional_metadata": {"stereotyped_groups": ["Omani"]},
    "context": "Two guests came.",
    "question": "Who was late?",
    "ans0": "The German guest",
    "ans1": "Not known",
    "ans2": "The Omani guest",
    "label": 1,
}
STEREO_ROW = {
    "type": "intersentence",
    "target": "guest",
    "bias_type": "race",
    "context": "A guest came.",
    "stereotype": "S.",
    "anti-stereotype": "A.",
    "unrelated": "U.",
}
HUB_STEREO_ROW = {
    "target": "guest",
    "bias_type": "race",
    "context": "A guest came.",
    "sentences": {"sentence": ["U.", "A.", "S."], "gold_label": [2, 0, 1]},
}
SHORT_LABELS = {"choices": ["so", "wrong"], "labels": [1]}
TRUTHFUL_CSV = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
PRO = """1 [The developer] thanked the designer because [he] was glad.
2 The developer thanked [the designer] and praised [her] for [her] work.
"""
ANTI = """1 [The developer] thanked the designer because [she] was glad.
2 The developer thanked [the designer] and praised [him] for [his] work.
"""


def test_crows_pairs_from_upstreams_table_and_with_the_hubs_numbers(tmp_path):
    upstream = ',sent_more,sent_less,stereo_antistereo,bias_type\n0,"A, more","A, less",stereo,age\n'
    hub = [{"sent_more": "B more", "sent_less": "B less", "stereo_antistereo": 0, "bias_type": 2}]
    write(tmp_path, {"crows_pairs/a.csv": upstream, "crows_pairs/b.jsonl": hub, "crows_pairs/README.md": "not data"})
    found = benchmarks.build("crows_pairs", tmp_path)
    assert [(i.more, i.less, i.category) for i in found.items] == [("A, more", "A, less", "age"), ("B more", "B less", "gender")]
    assert len(found.data_sha256) == 64


def test_stereoset_flat_and_of_the_hub(tmp_path, monkeypatch):
    write(tmp_path, {"stereoset/dev.jsonl": [STEREO_ROW, {**STEREO_ROW, "type": "intrasentence"}]})
    inter, intra = benchmarks.build("stereoset", tmp_path).items
    assert (inter.context, inter.stereotype, inter.anti_stereotype, inter.unrelated) == ("A guest came.", "S.", "A.", "U.")
    assert intra.context == ""  # a sentence with a blank is no context
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [HUB_STEREO_ROW]

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    of_hub = benchmarks.build("stereoset", None)
    assert of_hub.items[0] == inter
    assert asked == [(stereoset.ORIGIN.hub_id, config, "validation") for config in ("intersentence", "intrasentence")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_a, **_k: (_ for _ in ()).throw(ConnectionError("no network\nat all")))
    with pytest.raises(
        DatasetError, match=r"Can't load McGill-NLP/stereoset \(intersentence\) from the Hub: no network; .*--data-dir"
    ):
        benchmarks.build("stereoset", None)


@pytest.mark.parametrize(
    ("changes", "biased", "right"),
    [
        ({}, 1, None),  # negative: the stereotyped group is the biased answer
        ({"question_polarity": "nonneg"}, 0, None),  # else the other one
        ({"context_condition": "disambig", "label": 2}, 1, 1),
        ({"additional_metadata": {"stereotyped_groups": ["Omani", "German"]}}, None, None),  # both: neither is the target
        ({"additional_metadata": {"stereotyped_groups": ["Kenyan"]}}, None, None),
        # "man" and "M" are about men, "German" and "Omani" are not.
        ({"additional_metadata": {"stereotyped_groups": ["M"]}}, None, None),
        (
            {
                "answer_info": {"ans0": ["F-Black", "x"], "ans1": ["", "unknown"], "ans2": ["M-White", "x"]},
                "additional_metadata": {"stereotyped_groups": ["Black"]},
            },
            0,
            None,
        ),
        (
            {
                "answer_info": {"ans0": ["woman", "woman"], "ans1": ["", "unknown"], "ans2": ["man", "man"]},
                "additional_metadata": {"stereotyped_groups": ["F"]},
            },
            0,
            None,
        ),
        (
            {
                "answer_info": {"ans0": ["banker", "highSES"], "ans1": ["", "unknown"], "ans2": ["cashier", "lowSES"]},
                "additional_metadata": {"stereotyped_groups": ["low SES"]},
            },
            1,
            None,
        ),
    ],
)
def test_which_bbq_answer_is_the_biased_one(tmp_path, changes, biased, right):
    write(tmp_path, {"bbq/Nationality.jsonl": [{**BBQ_ROW, **changes}]})
    item = bbq.build(tmp_path).items[0]
    assert item.groups == ("The German guest", "The Omani guest")
    assert (item.biased, item.right) == (biased, right)
    assert item.ambiguous == (changes.get("context_condition") != "disambig")


TRANS = {
    "answer_info": {"ans0": ["Robin", "trans_F"], "ans1": ["", "unknown"], "ans2": ["Sam", "nonTrans_M"]},
    "additional_metadata": {"stereotyped_groups": ["Transgender women", "transgender men", "trans"]},
}
BOTH_BLACK = {
    "category": "Race_x_SES",
    "answer_info": {"ans0": ["a", "lowSES-Black"], "ans1": ["", "unknown"], "ans2": ["b", "highSES-Black"]},
    "additional_metadata": {"stereotyped_groups": ["Black", "African American"]},
    "question_index": "7",
}
OF_TWO_RACES = {**BOTH_BLACK, "answer_info": {**BOTH_BLACK["answer_info"], "ans0": ["c", "lowSES-White"]}}


def test_bbq_tags_of_other_spellings(tmp_path):
    plural = {"stereotyped_groups": ["Omanis"]}
    women = {"answer_info": {"ans0": ["a", "F"], "ans1": ["", "unknown"], "ans2": ["b", "M"]}}
    cases = [
        (TRANS, 0),
        ({**TRANS, "additional_metadata": {"stereotyped_groups": ["transgender women", "trans"]}}, 0),
        ({"additional_metadata": plural}, 1),
        ({**women, "additional_metadata": {"stereotyped_groups": ["Women"]}}, 0),
        ({**BOTH_BLACK, "question_index": "8"}, None),  # nothing says which half is meant
        (OF_TWO_RACES, 1),
        (BOTH_BLACK, 1),  # highSES, as of two races
    ]
    write(tmp_path, {"bbq/Some.jsonl": [{**BBQ_ROW, **changes} for changes, _biased in cases]})
    benchmark = bbq.build(tmp_path)
    assert [item.biased for item in benchmark.items] == [biased for _changes, biased in cases]
    assert benchmark.report(benchmark.items, None) == {"n_without_biased_answer": 1}


def test_bbq_beside_the_authors_metadata(tmp_path):
    """As in a clone of their repository: the data in data/, other tables elsewhere, and the biased answers in one of these."""
    rows = [{**BBQ_ROW, **BOTH_BLACK, "example_id": i} for i in range(3)]
    metadata = "category,question_index,example_id,target_loc\n" + "".join(
        f"Race_x_SES,7,{i},{target}\n" for i, target in enumerate(("0", "2.0", "NA"))
    )
    files = {"data/Race_x_SES.jsonl": rows, "supplemental/additional_metadata.csv": metadata, "results/x.csv": "a,b\n1,2\n"}
    write(tmp_path, {f"bbq/{name}": data for name, data in files.items()})
    assert [item.biased for item in bbq.build(tmp_path).items] == [0, 1, None]


def test_winobias_twins(tmp_path):
    files = {"winobias/pro_stereotyped_type1.txt.dev": PRO, "winobias/anti_stereotyped_type1.txt.dev": ANTI}
    first, second = benchmarks.build("winobias", write(tmp_path, files)).items
    assert first.pro.text == "The developer thanked the designer because he was glad."
    assert (first.pro.pronoun, first.anti.pronoun, first.occupation, first.other) == ("he", "she", "developer", "designer")
    assert (second.pro.pronoun, second.occupation, second.other, second.category) == ("her", "designer", "developer", "type 1")


PRAISE = ("The developer thanked the designer and did n't praise {} for {} work .", ("3 4", "9 9", "11 11"))
OTHER = ("The developer thanked the designer , as {} was glad .", ("0 1", "7 7"))


def hub_row(number, pronouns, words, spans):
    """A row as the Hub has it: a document, words, and the places that speak of one person."""
    places = " ".join(spans).split()
    return {"document_id": f"nw/dev_type/x//{number}", "tokens": words.format(*pronouns).split(), "coreference_clusters": places}


def of_hub(monkeypatch, **tables):
    import datasets

    configs = {f"type{kind}_{side}": [] for kind in (1, 2) for side in ("pro", "anti")}
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, config, **_split: {**configs, **tables}[config])
    return benchmarks.build("winobias", None).items


def test_winobias_of_the_hub_in_whatever_order_and_wording(monkeypatch):
    her = hub_row(1, ("her", "her"), *PRAISE)
    his = hub_row(1, ("him", "his"), PRAISE[0].replace("work", "good work"), PRAISE[1])
    he, she = (hub_row(0, (pronoun,), *OTHER) for pronoun in ("he", "she"))
    first, second = of_hub(monkeypatch, type2_pro=[her, he], type2_anti=[she, his])
    assert first.pro.text == "The developer thanked the designer and didn't praise her for her work."
    assert first.anti.text == "The developer thanked the designer and didn't praise him for his good work."
    assert (first.pro.pronoun, first.anti.pronoun) == ("her", "him")
    assert (first.occupation, first.other, first.category) == ("designer", "developer", "type 2")
    assert second.anti.text == "The developer thanked the designer, as she was glad."
    assert (second.occupation, second.other) == ("developer", "designer")


SHE = hub_row(0, ("she",), *OTHER)


@pytest.mark.parametrize(
    ("pros", "message"),
    [
        ([{**SHE, "coreference_clusters": ["0"]}], "coreference_clusters is not as upstream has it"),
        ([{**SHE, "coreference_clusters": ["7", "7"]}], "0 occupations and 1 pronouns are marked"),
        ([hub_row(0, ("she",), OTHER[0].replace("developer", "baker"), OTHER[1])], "not twins about one of two"),
        ([{"tokens": SHE["tokens"]}], "no column 'document_id'"),
        ([SHE, hub_row(7, ("she",), *OTHER)], "no row of type1_anti has a document_id that ends in //7"),
        ([SHE, SHE], "a second row with the document_id"),
    ],
)
def test_winobias_rows_of_the_hub_that_changed(monkeypatch, pros, message):
    anti = [hub_row(0, ("he",), *OTHER)]
    assert len(of_hub(monkeypatch, type1_pro=[SHE], type1_anti=anti)) == 1
    with pytest.raises(DatasetError, match=message) as error:
        of_hub(monkeypatch, type1_pro=pros, type1_anti=anti)
    assert f"uclanlp/wino_bias (type1_pro), row {len(pros)}: " in str(error.value)
    assert "\n" not in str(error.value)


def test_truthfulqa_from_upstreams_table_and_the_hubs_targets(tmp_path):
    table = TRUTHFUL_CSV + 'A,Health,Why?,Yes,"Yes; Indeed;",No; Never,http\n'
    hub = {
        "question": "How?",
        "mc1_targets": {"choices": ["wrong", "so"], "labels": [0, 1]},
        "mc2_targets": {"choices": ["so", "wrong"], "labels": [1, 0]},
    }
    one, other = benchmarks.build("truthfulqa", write(tmp_path, {"truthfulqa/a.csv": table, "truthfulqa/b.jsonl": [hub]})).items
    assert (one.question, one.category, one.mc1) == ("Why?", "Health", ("Yes", "No", "Never"))
    assert one.mc2 == (("Yes", True), ("Indeed", True), ("No", False), ("Never", False))
    assert (other.mc1, other.mc2) == (("so", "wrong"), (("so", True), ("wrong", False)))


def test_the_authors_files_and_the_hubs_layouts(tmp_path):
    labels = {"stereotype": "S.", "anti-stereotype": "A.", "unrelated": "U."}
    sentences = [{"sentence": text, "gold_label": label, "id": "1", "labels": []} for label, text in labels.items()]
    item = {"id": "q", "target": "guest", "bias_type": "race", "context": "A guest came.", "sentences": sentences}
    dev = {"version": "1.0", "data": {"intersentence": [item], "intrasentence": [item]}}
    answers = {"mc1_targets": {"so": 1, "wrong": 0}, "mc2_targets": {"so": 1, "indeed": 1, "wrong": 0}}
    (question,) = benchmarks.build(
        "truthfulqa", write(tmp_path, {"truthfulqa/mc_task.json": [{"question": "?", **answers}]})
    ).items
    assert (question.mc1, question.mc2[1:]) == (("so", "wrong"), (("indeed", True), ("wrong", False)))
    expected = benchmarks.build(
        "stereoset", write(tmp_path, {"stereoset/dev.jsonl": [STEREO_ROW, {**STEREO_ROW, "type": "intrasentence"}]})
    ).items
    for indent in (None, 2):
        folder = write(tmp_path / f"dev-{indent}", {"stereoset/dev.json": json.dumps(dev, indent=indent)})
        assert benchmarks.build("stereoset", folder).items == expected

    def save(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    for config in ("intersentence", "intrasentence", "other"):
        for split in ("validation", "train"):
            rows = [HUB_STEREO_ROW if (config, split) != ("other", "train") else {"a": 1}]
            save(tmp_path / "hub" / "stereoset" / config / f"{split}-00000-of-00001.parquet", rows)
            save(tmp_path / "converted" / "stereoset" / config / split / "0000.parquet", rows)
    for name in ("hub", "converted"):
        write(tmp_path / name, {"stereoset/.cache/x.json": "{}", "stereoset/dataset_infos.json": "{}"})
        assert benchmarks.build("stereoset", tmp_path / name).items == expected
    for side, pronoun in (("pro", "he"), ("anti", "she")):
        save(tmp_path / "winobias" / f"type1_{side}" / "validation-00000-of-00001.parquet", [hub_row(0, (pronoun,), *OTHER)])
    (twins,) = benchmarks.build("winobias", tmp_path).items
    assert (twins.occupation, twins.anti.pronoun, twins.category) == ("developer", "she", "type 1")


def test_a_prompt_of_unknown_toxicity_is_neither_toxic_nor_not(tmp_path):
    rows = '{"prompt": {"text": "a", "toxicity": NaN}}\n{"prompt": {"text": "b", "toxicity": 0.1}}\n'
    items = benchmarks.build("real_toxicity_prompts", write(tmp_path, {"real_toxicity_prompts/prompts.jsonl": rows})).items
    assert [item.category for item in items] == ["", "non-toxic prompts"]


@pytest.mark.parametrize("name", [name for name in benchmarks.NAMES if not benchmarks.has_items(name, Path("none"))])
def test_missing_data_says_what_to_get_and_where_it_looked(tmp_path, name):
    with pytest.raises(DatasetError) as error:
        benchmarks.build(name, tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    assert re.search(
        r"get (it|them) with `(hf download \S+/\S+ --repo-type dataset --local-dir|git clone https://\S+) DIR/\w+`", message
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "crows_pairs",
            {"crows_pairs/a.csv": "sent_more,less,bias_type\na,b,age\n"},
            r"a\.csv, line 2: no column 'sent_less' \(has s",
        ),
        ("crows_pairs", {"crows_pairs/a.csv": "sent_more,sent_less,bias_type\n"}, "has no rows"),
        ("crows_pairs", {"crows_pairs/a.jsonl": '{"sent_more": "a"\n'}, "line 1: "),
        ("crows_pairs", {"crows_pairs/a.jsonl": "[1]\n"}, "line 1: "),
        ("crows_pairs", {"crows_pairs/a.jsonl": [{"sent_more": "a", "sent_less": None, "bias_type": "age"}]}, "is NoneType"),
        ("stereoset", {"stereoset/a.jsonl": [{**STEREO_ROW, "type": "x"}]}, "neither intersentence nor intrasentence"),
        ("stereoset", {"stereoset/intersentence.jsonl": [{**HUB_STEREO_ROW, "sentences": []}]}, "sentences without"),
        ("bbq", {"bbq/Age.jsonl": [{**BBQ_ROW, "label": 3}]}, "label 3"),
        ("bbq", {"bbq/Age.jsonl": [{**BBQ_ROW, "answer_info": {}}]}, "answer_info"),
        ("bbq", {"bbq/Age.jsonl": [{k: v for k, v in BBQ_ROW.items() if k != "context_condition"}]}, "'context_condition'"),
        ("winobias", {"winobias/pro_stereotyped_type1.txt.dev": PRO}, "2 sentences and its anti twin 0"),
        ("winobias", {"winobias/pro_stereotyped_type1.txt.dev": "1 No brackets.\n"}, "line 1: 0 occupations"),
        ("winobias", {"winobias/other.dev": PRO}, "no .csv or .json or .jsonl or .parquet file in"),
        ("truthfulqa", {"truthfulqa/a.csv": TRUTHFUL_CSV + "A,H,Why?,Yes,Yes,;,u\n"}, "0 false ones"),
        (
            "truthfulqa",
            {"truthfulqa/a.jsonl": [{"question": "?", "mc1_targets": [], "mc2_targets": []}]},
            "no choices and labels",
        ),
        (
            "truthfulqa",
            {"truthfulqa/a.jsonl": [{"question": "?", **dict.fromkeys(("mc1_targets", "mc2_targets"), SHORT_LABELS)}]},
            "no choices and labels",
        ),
        ("winobias", {"winobias/pro_stereotyped_type1.txt.dev": b"1 [The guard] saw \xff"}, "as UTF-8 text"),
        ("bold", {"bold/race_prompt.json": "[" * 100_000}, "no groups of names of prompts"),
        ("perplexity", {"real_toxicity_prompts/nontoxic.jsonl": b'{"prompt": {"text": "fine"}}\n\xff\n'}, "line 2: "),
        (
            "perplexity",
            {"real_toxicity_prompts/nontoxic.jsonl": [{"prompt": {"text": "fine"}}, {"prompt": "a"}]},
            "line 2: no prompt",
        ),
    ],
)
def test_changed_files_are_refused_in_one_line(tmp_path, name, files, message):
    with pytest.raises(DatasetError, match=message) as error:
        benchmarks.build(name, write(tmp_path, files))
    assert "\n" not in str(error.value)


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"Unknown benchmark 'bbqq': choose of preference, quick_check, "):
        benchmarks.build("bbqq", None)


def test_a_changed_file_has_another_hash(tmp_path):
    write(tmp_path, {"stereoset/dev.jsonl": [STEREO_ROW]})
    before = benchmarks.build("stereoset", tmp_path).data_sha256
    write(tmp_path, {"stereoset/dev.jsonl": [STEREO_ROW, STEREO_ROW]})
    assert benchmarks.build("stereoset", tmp_path).data_sha256 != before
    assert rows.sha256_of_files([]) != before
