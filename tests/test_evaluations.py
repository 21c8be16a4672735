"""What is asked for, and what is made of a result: damaged files, tables, reports, CSV, cards. The results are by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from biasdpo import access, cli, models
from biasdpo.config import EvaluationConfig
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.splits import split
from biasdpo.errors import ConfigError, DatasetError, EvaluationError, RefusedError
from biasdpo.evaluation import report, results, run
from biasdpo.evaluation.results import TableRow, compare, group_table, table
from biasdpo.jobs.resolve import command_of, parts
from biasdpo.workspace import ASSETS, sha256_of
from tests.lora_factory import write_lora
from tests.run_folders import write_run


def interval(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "ci95": [low, high]}


def change(value: float, low: float, high: float, verdict: str, better: str, measures: str = "bias") -> dict[str, Any]:
    decided = {"p_value": 0.01, "p_holm": 0.04, "verdict": verdict, "better": better, "measures": measures}
    return interval(value, low, high) | decided | {"improvement": interval(-value, -high, -low) | {"p_value": 0.01}}


def a_result(**provenance: Any) -> dict[str, Any]:
    """60 % of sentence pairs prefer the stereotype, tuned 52 %; neutral text is 1 % more perplexing."""
    metrics = {
        "base": {"stereotype_percent": interval(60, 50, 70)},
        "tuned": {"stereotype_percent": interval(52, 42, 62)},
        "difference": {"stereotype_percent": change(-8, -12, -4, "less biased", "nearer 50")},
        "paired": {},
    }
    sentences = {
        "n": 100,
        "n_failed": 2,
        "n_total": 102,
        "not_comparable": "",
        "data_sha256": "d" * 64,
        **metrics,
        "groups": {"age": {**metrics, "n": 40}},
        "failures": [{"index": 7, "reason": "too long | by far"}],
        "columns": ["logp_more", "logp_less"],
        "items": [{"index": i, "base": [-1.0, -2.0], "tuned": [-1.0, -2.0]} for i in range(100)],
    }
    utility = {
        "n": 50,
        "n_failed": 0,
        "n_total": 600,
        "not_comparable": "limited to 50 of 600 items",
        "data_sha256": "e" * 64,
        "base": {"perplexity": interval(40, 30, 50)},
        "tuned": {"perplexity": interval(40.4, 30.3, 50.5)},
        "difference": {"perplexity": change(0.4, 0.2, 0.6, "worse", "lower", "quality")},
        "paired": {"perplexity_change_percent": change(1, 0.5, 1.5, "worse", "lower", "quality") | {"without_change": 0.0}},
        "groups": {},
    }
    known = {"model": "smollm2", "adapter": "mine", "backend": "llamacpp", "strength": 1.0, "seed": 0, "limit": None}
    known |= {"interrupted": False, "code_version": "0.1.0", "model_sha256": "a" * 64, "adapter_sha256": "b" * 64}
    return {"benchmarks": {"crows_pairs": sentences, "utility": utility}, "provenance": known | provenance}


# What is asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": 3}, "model must be text: got 3"),
        ({"backend": "vllm"}, "backend must be one of auto, llamacpp, .*got 'vllm'"),
        ({"benchmarks": ("bbqq",)}, "benchmarks must be one of preference, .*got 'bbqq'"),
        ({"benchmarks": ("bbq", "bbq")}, "benchmarks names a value twice: got bbq, bbq"),
        ({"limit": 0}, "limit must be a whole number from 1 to 1000000000: got 0"),
        ({"limit": True}, "limit must be a whole number from 1 to 1000000000: got True"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647: got -1"),
        ({"strengths": ()}, "strengths is empty"),
        ({"strengths": (1.0, 2.0)}, "strengths must be a number from 0 to 1.5: got 2.0"),
        ({"strengths": (0.5, 0.5)}, "strengths names a value twice"),
        ({"strengths": (0.5, 1.0), "adapter": "none"}, "strengths apply to an adapter"),
        ({"benchmarks": ("preference",)}, "preference needs pairs: give --dataset"),
        ({"samples": 0}, "samples must be a whole number from 1 to 4096: got 0"),
    ],
)
def test_what_can_not_be_asked_is_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        EvaluationConfig(**{"model": "smollm2", "benchmarks": ("bbq",), **changes})
    assert "\n" not in str(error.value)


def test_a_request_becomes_the_command_that_means_it_and_json_that_gives_it_back(tmp_path, monkeypatch):
    wanted = EvaluationConfig(
        model="smollm2",
        adapter="-mine",  # an argument that begins with a dash
        backend="llamacpp",
        benchmarks=("bbq", "preference"),
        limit=7,
        seed=3,
        strengths=(0.0, 0.25, 1.0),
        data_dir="/data",
        dataset="run",
        samples=2,
        max_new_tokens=9,
        toxicity_scorer="hub:a/b",
    )
    asked: list[object] = []

    def resolve(config, workspace):
        asked.extend((config, workspace.root))
        raise EvaluationError("no more is needed")

    monkeypatch.setattr("biasdpo.jobs.resolve.resolve_evaluation", resolve)
    assert cli.main(command_of(wanted, tmp_path / "out.json", tmp_path)[3:]) == 2
    assert asked == [wanted, tmp_path]
    assert EvaluationConfig(**json.loads(json.dumps(wanted.to_json()))) == wanted


def test_the_names_of_a_result():
    asked = EvaluationConfig(model="smollm2", benchmarks=("perplexity", "bbq"))
    assert parts(asked) == ["utility", "bbq"]
    assert parts(asked.replace(benchmarks=("utility",))) == ["utility", "utility_generation"]


def test_pairs_of_the_adapters_own_run_or_of_the_workspace(workspace):
    rows = [PreferencePair(f"Is {i} more than {i * 7}, and why?", f"No {i}.", f"Yes {i}!") for i in range(60)]
    lines = "".join(json.dumps({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}) + "\n" for r in rows)
    folder = workspace.run_folder("first")
    adapter_folder = write_lora(folder / "adapter", layers=1)
    file = folder / "dataset.jsonl"
    file.write_text(lines)
    made_of = {"model": "smollm2", "dataset_sha256": sha256_of(file), "config": {"held_out_share": 0.5}}
    (adapter_folder / "provenance.json").write_text(json.dumps(made_of))
    adapter = models.from_run(workspace, "first")
    held_out = [pair.prompt for pair in split(rows, 0.5).held_out]
    assert 0 < len(held_out) < 60
    scored = run.preference_benchmark("run", adapter, workspace)
    assert [pair.prompt for pair in scored.items] == held_out
    assert [pair.prompt for pair in run.preference_benchmark(str(file), adapter, workspace).items] == held_out
    with pytest.raises(ConfigError, match="there is none: name a file"):
        run.preference_benchmark("run", None, workspace)
    file.write_text(lines + lines.replace("Is", "Was"))  # not what it was trained on any more
    with pytest.raises(DatasetError, match="first was trained on is not in this workspace"):
        run.preference_benchmark("run", adapter, workspace)
    with pytest.raises(DatasetError, match="No preference pairs in the workspace yet"):
        run.preference_benchmark("workspace", adapter, workspace)


# Result files


def a_complete_result() -> dict[str, Any]:
    """A small result with every key that a result can have."""
    made = a_result(strengths=[0.5, 1.0], adapter_config_sha256="c" * 64)
    sentences = made["benchmarks"].pop("crows_pairs")
    item = {"index": 3, "more": "One.", "less": "Two.", "category": "age", "base": [-1.0, -2.0], "tuned": [-2.0, -1.0]}
    item |= {"outcome": {"base": "prefers chosen", "tuned": "prefers rejected"}, "completions": {"base": ["a"], "tuned": ["b"]}}
    of_both = change(0.7, 0.6, 0.8, "better", "higher") | {"without_change": 0.5, "restates": ""}
    sentences |= {"items": [item], "partial": False, "not_as_published": "5 samples", "pick_the_longer_baseline": 0.5}
    sentences |= {"settings": {"samples": 5, "prompt": "bare text"}, "paired": {"reward_accuracy": of_both}}
    sentences["difference"]["stereotype_percent"]["base_includes_ideal"] = True
    brief = {name: value for name, value in sentences.items() if name not in ("items", "failures", "columns")}
    curve = [{"strength": strength, "benchmarks": {"crows_pairs": brief}} for strength in (0.5, 1.0)]
    made["provenance"]["pairs_source"] = "26 held-out pairs of run mine"
    missing = {"bbq": "No items of bbq: get them"}
    return {"format": 1, "benchmarks": {"crows_pairs": sentences}, "missing": missing, "curve": curve} | {
        "provenance": made["provenance"]
    }


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a JSON value is."""
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*at, key))


PATHS = [path for path in paths(a_complete_result()) if path[0] != "curve" or len(path) < 5]


def changed(path: tuple[Any, ...], *value: Any) -> dict[str, Any]:
    """The complete result with another value at a path, or without it."""
    made = a_complete_result()
    within: Any = made
    for key in path[:-1]:
        within = within[key]
    if value:
        within[path[-1]] = value[0]
    else:
        del within[path[-1]]
    return made


def refused(file: Path) -> str:
    """The one line that says why a file is no result, as a listing shows it too."""
    with pytest.raises(EvaluationError) as error:
        results.load(file)
    message = str(error.value)
    assert "\n" not in message
    assert str(file) in message
    assert len(message) < 600
    assert results.summary(file, file.stat().st_mtime_ns if file.is_file() else 0) == (False, message)
    return message


def use(result: dict[str, Any]) -> None:
    """Everything that is made of a result."""
    for name in result["benchmarks"]:
        group_table(result, name)
        results.flips(result, name)
    for name, metric in results.curve_metrics(result):
        results.curve_points(result, name, metric)
    report.markdown(result)
    report.markdown([("A", result), ("B", a_complete_result())])
    report.csv_rows(result)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Can't read"),
        (b'{"benchmarks": {}, "prov', "Can't read"),
        (b"\xff\xfe{}", "Can't read"),
        (b"[" * 100_000, "Can't read"),
        (b'{"benchmarks": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "Can't read"),
        (b"[]", "no evaluation result (list: "),
        (b"null", "no evaluation result (NoneType: "),
        (b"{}", "no evaluation result (benchmarks: field required)"),
        (b'{"format": 2, "anything": 1}', "has format 2, and this version of BiasDPO reads up to 1: update BiasDPO"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, content, words):
    file = tmp_path / "result.json"
    assert "No file" in refused(file)
    results.summary.cache_clear()
    file.write_bytes(content)
    message = refused(file)
    assert words in message
    assert "evaluate again" in message or "update" in message


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_type_at_any_key_is_one_line_and_a_missing_one_never_a_crash(tmp_path, path):
    file = tmp_path / "result.json"
    file.write_text(json.dumps(changed(path, [{}])))
    assert "no evaluation result (" in refused(file)
    file.write_text(json.dumps(changed(path)))
    try:
        found = results.load(file)
    except EvaluationError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right
    else:
        use(found)


def test_a_whole_result_is_read_as_it_is(tmp_path):
    file = tmp_path / "result.json"
    for made in (a_complete_result(), a_result(), json.loads((ASSETS / "adapters/smollm2-biasdpo/evaluation.json").read_text())):
        file.write_text(json.dumps(made))
        assert results.load(file) == made
        use(made)


# Tables


def test_a_table_has_a_row_a_metric():
    rows = table(a_result())
    assert [(row.benchmark, row.metric) for row in rows] == [
        ("crows_pairs", "stereotype_percent"), ("utility", "perplexity"), ("utility", "perplexity_change_percent")
    ]  # fmt: skip
    assert rows[0] == TableRow(
        benchmark="crows_pairs",
        metric="stereotype_percent",
        group="",
        n=100,
        n_failed=2,
        base=60,
        base_ci=(50, 70),
        tuned=52,
        tuned_ci=(42, 62),
        difference=-8,
        ci=(-12, -4),
        p_value=0.01,
        p_holm=0.04,
        verdict="less biased",
        better="nearer 50",
        measures="bias",
        comparable=True,
        why_not="",
    )
    both = rows[2]
    assert (both.base, both.tuned, both.difference, both.no_change) == (None, None, 1, 0.0)
    assert (both.comparable, both.why_not) == (False, "limited to 50 of 600 items")
    (of_group,) = group_table(a_result(), "crows_pairs")
    assert (of_group.group, of_group.n, of_group.n_failed, of_group.base) == ("age", 40, 0, 60)
    assert group_table(a_result(), "bbq") == []


def test_base_alone_has_nothing_to_decide():
    result = a_result(adapter="")
    del result["benchmarks"]["utility"]
    result["benchmarks"]["crows_pairs"] |= {"tuned": {}, "difference": {}}
    (row,) = table(result)
    assert (row.base, row.tuned, row.difference, row.verdict, row.p_holm) == (60, None, None, "", None)
    assert "none: the base model alone" in report.markdown(result)


def test_csv_has_the_table_and_the_groups():
    rows = report.csv_rows(a_result())
    assert [(row["metric"], row["group"]) for row in rows] == [
        ("stereotype_percent", ""), ("perplexity", ""), ("perplexity_change_percent", ""), ("stereotype_percent", "age")
    ]  # fmt: skip
    first = rows[0]
    assert (first["base"], first["base_ci_low"], first["base_ci_high"], first["ci_low"]) == (60, 50, 70, -12)
    assert (first["model"], first["adapter"], first["comparable"]) == ("smollm2", "mine", True)
    assert (rows[2]["base"], rows[2]["base_ci_low"]) == (None, None)


# Reports


def test_a_report_says_what_was_measured_and_what_it_may_be_compared_with():
    command = command_of(EvaluationConfig(model="/home/me/base.gguf", data_dir="/home/me/data", benchmarks=("bbq",)))
    text = report.markdown(a_result(), command)
    lines = text.split("\n")
    assert lines[0] == "# Evaluation of mine on smollm2"
    sentences, perplexity = (next(line for line in lines if f"| {name} " in line) for name in ("crows_pairs", "utility"))
    assert sentences == (
        "| crows_pairs | stereotype_percent (nearer 50 is better) | 100 | 60 [50, 70] | 52 [42, 62] | -8 [-12, -4] | 0.04 | "
        "less biased |"
    )
    assert "| 50 * |" in perplexity
    assert lines.index("## Benchmarks") < lines.index(sentences) < lines.index("## Quality cost") < lines.index(perplexity)
    assert "- Perplexity of neutral text: not comparable with other evaluations: limited to 50 of 600 items." in lines
    assert "- CrowS-Pairs: 2 items could not be scored; the first: too long \\| by far." in lines
    outcome = "Clearly less biased on 1 of 1 benchmark; quality cost: Perplexity +0.400, Perplexity change (%) +1.000"
    assert f"**{outcome}; Perplexity of neutral text was limited to 50 of 600 items.**" in lines
    assert "<details><summary>crows_pairs by group</summary>" in lines
    assert "python -m biasdpo evaluate --model=base.gguf --benchmark=bbq --data-dir=data --out=result.json" in lines
    assert "/home/me" not in text
    assert "Interrupted" not in text
    assert "**Interrupted" in report.markdown(a_result(interrupted=True))


def test_several_reports_stand_side_by_side_where_they_may():
    first, other, foreign = a_result(), a_result(adapter="other"), a_result(adapter="third")
    other["benchmarks"]["crows_pairs"]["tuned"]["stereotype_percent"] = interval(49, 39, 59)
    foreign["benchmarks"]["utility"]["data_sha256"] = "f" * 64
    text = report.markdown([("A", first), ("B", other), ("C", foreign)])
    assert "## B: other on smollm2" in text
    row = "| crows_pairs | stereotype_percent (nearer 50 is better) | 52 [42, 62]<br>less biased | 49 [39, 59]<br>less biased |"
    assert row in text
    assert "| utility | perplexity (lower is better) * | 40.4 [30.3, 50.5]<br>worse |" in text
    assert "- \\* utility: scored on different data" in text


def test_what_may_be_compared():
    def why(benchmark: str = "crows_pairs", **changes: Any) -> str:
        other = a_result(**changes.pop("provenance", {}))
        other["benchmarks"]["crows_pairs"] |= changes
        rows = compare([("A", a_result()), ("B", other)])
        return next(row.why_not for row in rows if row.benchmark == benchmark)

    assert why() == ""
    assert why(data_sha256="f" * 64) == "scored on different data"
    assert why(n=99) == "scored on different numbers of items (100, 99)"
    assert why(settings={"samples": 25}) == "generated with different settings"
    assert why(provenance={"seed": 1}) == ""  # all items: whatever the seed
    assert why(provenance={"seed": 1}, items=[{"index": i + 1} for i in range(100)]) == "scored on different draws of items"
    lacking = a_result()
    del lacking["benchmarks"]["utility"]
    rows = compare([("A", lacking), ("B", a_result())])
    assert [(row.metric, [cell is None for cell in row.cells], row.comparable) for row in rows[1:]] == [
        ("perplexity", [True, False], True), ("perplexity_change_percent", [True, False], True)
    ]  # fmt: skip


# The adapter's card


def test_a_card_gets_one_section_that_the_next_evaluation_replaces(workspace, monkeypatch):
    folder = write_run(workspace.root, "mine").adapter
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\n---\n# mine\n\nMade here.\n")
    known = models.from_run(workspace, "mine")
    result = a_result(adapter="mine", adapter_sha256=sha256_of(known.weights))
    files = {path.name for path in folder.iterdir()}
    assert report.add_to_card(result, workspace) == card
    once = card.read_text()
    assert once.startswith("---\nlicense: mit\n---\n# mine\n\nMade here.\n\n<!-- evaluation: begin -->\n## Evaluation\n")
    assert once.endswith("<!-- evaluation: end -->\n")
    assert "### Benchmarks" in once
    assert once.count("52 [42, 62]") == 2  # overall and in the group
    card.write_text(once + "\nWritten by hand below.\n")
    later = deepcopy(result)
    later["benchmarks"]["crows_pairs"]["tuned"]["stereotype_percent"] = interval(51, 41, 61)
    report.add_to_card(later, workspace)
    twice = card.read_text()
    assert twice == once.replace("| 52 [42, 62] | -8 [-12, -4] | 0.04 | less biased |", "CHANGED").replace(
        "CHANGED", "| 51 [41, 61] | -8 [-12, -4] | 0.04 | less biased |"
    ) + "\nWritten by hand below.\n"  # fmt: skip
    assert {path.name for path in folder.iterdir()} == files | {"README.md"}
    # What must not be written into.
    for bad, words in (
        (a_result(adapter="mine"), "has another adapter now"),
        (a_result(adapter="smollm2-biasdpo"), "smollm2-biasdpo is no run's adapter"),
        (a_result(adapter=""), "The base model is no run's adapter"),
        ({**result, "provenance": result["provenance"] | {"interrupted": True}}, "An interrupted evaluation"),
    ):
        with pytest.raises(EvaluationError, match=words):
            report.add_to_card(bad, workspace)
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    with pytest.raises(RefusedError):
        report.add_to_card(result, workspace)
    assert card.read_text() == twice
