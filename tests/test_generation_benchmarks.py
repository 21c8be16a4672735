"""Benchmarks by generation: formulas by hand, what is written and kept, one real model on a few prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from biasdpo import benchmarks
from biasdpo.backends.hf import open_classifier
from biasdpo.benchmarks import real_toxicity_prompts
from biasdpo.benchmarks.bold import Beginning, Bold
from biasdpo.benchmarks.real_toxicity_prompts import RealToxicityPrompts, WebText
from biasdpo.benchmarks.toxicity import ToxicityScorer, profanity_check
from biasdpo.benchmarks.utility import Prompt, Utility, UtilityGeneration, distinct, evades, words_of
from biasdpo.errors import BackendError, ConfigError, DatasetError
from biasdpo.evaluation.run import correct, summarize
from biasdpo.records import Completion
from tests.evaluating import write_files as write

RTP_ROW = {"prompt": {"text": "The sun rose ", "toxicity": 0.1}, "continuation": {"text": " over."}}

# A scorer of our own: the number that a text ends with.
BY_NUMBER = ToxicityScorer("by_number", "1", lambda texts: [float(text.split()[-1]) for text in texts])


def written(*texts: str, tokens: int = 3) -> list[Completion]:
    return [Completion("base", text, tokens, "end_of_text") for text in texts]


# Formulas


def test_expected_maximum_and_probability_by_hand():
    benchmark = RealToxicityPrompts([WebText("p", 0.9), WebText("q", 0.1), WebText("r", None)], BY_NUMBER, samples=3)
    outputs = [written("x 0.1", "x 0.7", "x 0.2"), written("x 0.3", "x 0.1", "x 0.4"), written("x 0.5", " ", "")]
    numbers = benchmark.scores(benchmark.items, outputs)
    assert numbers == [[0.7, 1, 0.1, 0.7, 0.2], [0.4, 0, 0.3, 0.1, 0.4], [0.5, 1, 0.5, 0.5, 0.5]]
    metrics = benchmark.side_metrics()
    assert list(metrics) == ["by_number_expected_max", "by_number_probability"]
    assert metrics["by_number_expected_max"](np.array(numbers)) == pytest.approx((0.7 + 0.4 + 0.5) / 3)
    assert metrics["by_number_probability"](np.array(numbers)) == pytest.approx(2 / 3)
    assert [benchmark.groups(item) for item in benchmark.items] == [["toxic prompts"], ["non-toxic prompts"], []]
    assert benchmark.outcome(benchmark.items[0], numbers[0]) == "toxic by by_number"
    assert not np.isfinite(benchmark.scores(benchmark.items[:1], [written("", " ", "\n")])[0][0])  # nothing to score
    assert benchmark.not_as_published == "3 samples a prompt, not 25; scores of by_number 1, not Perspective's"
    assert RealToxicityPrompts([], BY_NUMBER, samples=25).not_as_published == "scores of by_number 1, not Perspective's"
    with pytest.raises(ConfigError, match="--samples must be from 1 to 100: got 0"):
        RealToxicityPrompts([], BY_NUMBER, samples=0)


def people(**sentiments_of: list[float]) -> tuple[Bold, np.ndarray]:
    """Items, one a number, of groups named DOMAIN_GROUP, and their numbers (N, 3): toxic where the sentiment is below 0."""
    names = [(name, value) for name, values in sentiments_of.items() for value in values]
    benchmark = Bold([Beginning("x", name.split("_")[0], name) for name, _ in names], BY_NUMBER)
    groups = [benchmark.scores([item], [written("x 0.1")])[0][2] for item in benchmark.items]
    return benchmark, np.array(
        [[value, 0.9 if value < 0 else 0.1, group] for (_, value), group in zip(names, groups, strict=True)]
    )


def test_bolds_gap_by_hand():
    benchmark, numbers = people(
        gender_a=[0.5] * 20,
        gender_b=[0.1] * 10 + [-0.1] * 10,
        race_a=[0.2] * 20,
        race_b=[0.6] * 20,
        race_c=[0.4] * 30,
        race_d=[-1.0] * 19,
        religion_a=[0.9] * 20,
    )
    metrics = benchmark.side_metrics()
    # gender: 0.5 - 0; race: 0.6 - 0.2, since d has less than 20 items; religion has one group only
    assert metrics["vader_sentiment_gap"](numbers) == pytest.approx((0.5 + 0.4) / 2)
    # gender: 50 % of b's completions are toxic and none of a's; race: none
    assert metrics["by_number_percent_gap"](numbers) == pytest.approx((50 - 0 + 0) / 2)
    assert metrics["by_number_percent"](numbers) == pytest.approx(100 * (10 + 19) / 149)
    assert metrics["vader_positive_percent"](numbers) == pytest.approx(100 * (20 + 20 + 20) / 149)  # 0.5 is positive
    assert metrics["vader_negative_percent"](numbers) == pytest.approx(100 * 19 / 149)
    tuned = numbers.copy()
    tuned[:, 0] = 0.3
    tuned[:, 1] = 0.1
    result = summarize(benchmark, benchmark.items, numbers, tuned)
    correct({"bold": result})
    change = result["difference"]["vader_sentiment_gap"]
    assert change["value"] == pytest.approx(-0.45)  # all are treated alike
    assert (change["verdict"], change["better"]) == ("less biased", "lower")
    assert result["groups"]["gender"]["base"]["vader_sentiment_gap"]["value"] == pytest.approx(0.5)
    assert "vader_sentiment_gap" not in result["groups"]["religion"]["base"]  # one group lies apart from nothing
    assert "vader_sentiment_gap" not in result["groups"]["race_a"]["base"]
    small, few = people(gender_a=[0.1] * 3, gender_b=[0.2] * 3)
    assert "vader_sentiment_gap" not in summarize(small, small.items, few, None)["base"]


def test_bold_scores_the_completion_alone_and_by_vader():
    benchmark = Bold([Beginning("A hateful, terrible man", "gender", "men")], BY_NUMBER)
    ((sentiment, toxicity, _),) = benchmark.scores(benchmark.items, [written(" is a great and happy 0.25")])
    assert (sentiment, toxicity) == (pytest.approx(0.8316, abs=1e-3), 0.25)  # the prompt's own words do not count
    assert not np.isfinite(benchmark.scores(benchmark.items, [written("\n")])[0][0])
    assert [benchmark.outcome(None, [value, 0, 0]) for value in (0.5, 0.49, -0.5)] == ["positive", "neutral", "negative"]
    (request,) = benchmark.requests(benchmark.items[0])
    assert (request.prompt, request.bare, request.sampling.max_new_tokens) == ("A hateful, terrible man", True, 32)


def test_measures_of_a_text_by_hand():
    said = words_of("The cat, the CAT and the dog.")
    assert said == ["the", "cat", "the", "cat", "and", "the", "dog"]
    assert distinct(said, 1) == 4 / 7
    assert distinct(said, 2) == 5 / 6  # "the cat" twice
    assert distinct(list("abcdabcda"), 4) == pytest.approx(4 / 6)  # of 6 4-grams abcd and bcda come again
    assert evades("I’m  sorry, but that is not for me to say.")
    assert evades("As an AI, I have none.")
    assert not evades("Bali cannot be reached by train.")
    assert not evades("x " * 101 + "I'm sorry")  # behind the beginning


def test_prices_of_generation_by_hand():
    benchmark = UtilityGeneration([Prompt("p", "neutral"), Prompt("q", "probing"), Prompt("r", "probing")])
    texts = ["a b a b a b", "I'm sorry", "yes"]
    lengths = zip(texts, (10, 4, 1), strict=True)
    outputs = [[replace(completion, tokens=n)] for text, n in lengths for completion in written(text)]
    outputs[0] = [replace(outputs[0][0], finish_reason="limit")]
    base = np.array(benchmark.scores(benchmark.items, outputs))
    assert base[0].tolist() == [10, 0, 0, 6, 2 / 6, 2 / 5, pytest.approx(1 / 3)]  # abab, baba, abab
    metrics = benchmark.side_metrics()
    assert metrics["mean_tokens"](base) == 5
    assert metrics["ended_percent"](base) == pytest.approx(200 / 3)
    assert metrics["evasion_percent"](base) == pytest.approx(100 / 3)
    assert metrics["distinct_1"](base) == pytest.approx((2 / 6 + 1 + 1) / 3)
    assert metrics["distinct_2"](base) == pytest.approx((2 / 5 + 1) / 2)  # "yes" has no bigram; "i m sorry" has two
    assert metrics["repetition_4_percent"](base) == pytest.approx(100 / 3)  # one completion has 4-grams
    tuned = base.copy()
    tuned[:, 0] = [5, 2, 0.5]
    change = benchmark.paired_metrics()["mean_tokens_change_percent"]
    assert change(np.concatenate([base, tuned], axis=1)) == pytest.approx(-50)
    assert [benchmark.outcome(None, numbers) for numbers in base] == ["does not evade", "evades", "does not evade"]


def test_a_change_of_length_is_a_price_either_way_and_asked_once():
    benchmark = UtilityGeneration([Prompt(str(i), "neutral") for i in range(40)])
    base = np.ones((40, 7))
    base[:, 0] = np.arange(40) + 60
    for tuned_length, verdict in (
        (base[:, 0] * 0.5, "worse"),
        (base[:, 0] * 1.5, "worse"),
        (base[::-1, 0], "no clear difference"),
    ):
        tuned = base.copy()
        tuned[:, 0] = tuned_length
        result = summarize(benchmark, benchmark.items, base, tuned)
        correct({"utility_generation": result})
        length, percent = result["difference"]["mean_tokens"], result["paired"]["mean_tokens_change_percent"]
        assert (length["verdict"], length["better"]) == (verdict, "unchanged")
        assert length["improvement"]["value"] == pytest.approx(-abs(tuned_length.mean() - base[:, 0].mean()))
        assert length["improvement"]["ci95"][0] <= length["improvement"]["value"] <= length["improvement"]["ci95"][1] <= 0
        assert {key: percent[key] for key in ("p_value", "p_holm", "verdict")} == {
            key: length[key] for key in ("p_value", "p_holm", "verdict")
        }
    # Only one of the two takes a place in Holm's table: alone in it, its p-value is not multiplied.
    texts = Utility(["a", "b"])
    base, tuned = np.array([[-2.0, 1.0]] * 30), np.array([[-3.0, 1.0]] * 30)
    found = summarize(texts, ["t"] * 30, base, tuned)
    correct({"utility": found})
    assert found["difference"]["perplexity"]["p_holm"] == found["difference"]["perplexity"]["improvement"]["p_value"]
    assert found["paired"]["perplexity_change_percent"]["verdict"] == "worse"


# Toxicity scorers


def test_the_local_proxy_tells_offensive_words_and_goes_by_its_own_name():
    scorer = profanity_check()
    offensive, harmless = scorer.score_all(["You are a fucking idiot.", "The tulips bloom in spring."])
    assert offensive > 0.9
    assert harmless < 0.1
    assert scorer.describe().startswith("profanity_check 1.")
    assert scorer.score_all([]) == []


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda _texts: (_ for _ in ()).throw(RuntimeError("no\nmemory")), "The toxicity scorer s failed: no; "),
        (lambda _texts: [0.1], "gave .0.1. for 2 texts"),
        (lambda _texts: [0.1, float("nan")], "not a number from 0 to 1 for each"),
        (lambda _texts: [0.1, 1.5], "not a number from 0 to 1 for each"),
    ],
)
def test_a_scorer_that_fails_is_an_error_and_never_toxicity_0(score, message):
    with pytest.raises(BackendError, match=message) as error:
        ToxicityScorer("s", "1", score).score_all(["a", "b"])
    assert "\n" not in str(error.value)


def test_a_classifier_of_the_hub(tmp_path, tiny_bytes):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    def save(name: str, labels: list[str], **settings: object) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_bytes)
        tokenizer.pad_token = tokenizer.eos_token
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **settings,
        )
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    two = save("two", ["neutral", "toxic"])
    scorer, other = open_classifier(two), open_classifier(f"{two}#neutral")
    texts = ["a", "a longer text"]
    for one, rest in zip(scorer.score_all(texts), other.score_all(texts), strict=True):
        assert one + rest == pytest.approx(1)  # a softmax over both labels
    assert scorer.score_all(texts[:1])[0] == pytest.approx(scorer.score_all(texts)[0], abs=1e-5)  # a batch changes nothing
    assert scorer.version == "local (toxic)"
    before = scorer.score_all(texts)
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(LlamaForSequenceClassification.from_pretrained(two), lora).save_pretrained(two)
    assert open_classifier(two).score_all(texts) == before  # an adapter in its folder is not loaded with it
    several = save("several", ["toxic", "threat", "insult"], problem_type="multi_label_classification")
    total = sum(open_classifier(f"{several}#{label}").score_all(["a"])[0] for label in ("toxic", "threat", "insult"))
    assert total != pytest.approx(1, abs=1e-3)  # each label for itself
    with pytest.raises(ConfigError, match="has the labels LABEL_0, LABEL_1: name the toxic one"):
        open_classifier(save("unnamed", ["LABEL_0", "LABEL_1"]))
    with pytest.raises(BackendError, match="Can't load the classifier owner/none: ") as error:
        open_classifier("owner/none")
    assert "\n" not in str(error.value)


# Where the items come from


def test_bold_from_upstreams_files_and_with_the_hubs_columns(tmp_path):
    upstream = {"American_actors": {"A_B": ["A. B. is an actor who ", " "]}, "American_actresses": {"C": ["C. is "]}}
    found = benchmarks.build("bold", write(tmp_path, {"bold/gender_prompt.json": upstream, "bold/gender_wiki.json": upstream}))
    assert [(i.text, i.domain, i.group) for i in found.items] == [
        ("A. B. is an actor who", "gender", "American_actors"),
        ("C. is", "gender", "American_actresses"),
    ]
    assert len(found.data_sha256) == 64
    hub = [
        {"domain": "gender", "name": "A_B", "category": "American_actors", "prompts": ["A. B. is an actor who "], "wikipedia": []}
    ]
    other = benchmarks.build("bold", write(tmp_path / "hub", {"bold/train.jsonl": hub}))
    assert other.items == found.items[:1]
    for files in ({"bold/race_prompt.json": [1]}, {"bold/race_prompt.json": {"a": {"b": "text"}}}):
        with pytest.raises(DatasetError, match=r"race_prompt\.json: .*hf download AmazonScience/bold"):
            benchmarks.build("bold", write(tmp_path / "bad", files))


def test_real_toxicity_prompts_and_the_neutral_texts_among_them(tmp_path, monkeypatch):
    nothing = {**RTP_ROW, "prompt": {"text": "No score", "toxicity": None}}
    toxic = {**RTP_ROW, "prompt": {"text": "You fool", "toxicity": 0.9}}
    rows = [RTP_ROW, toxic, nothing]
    folder = write(tmp_path, {"real_toxicity_prompts/prompts.jsonl": rows})
    found = benchmarks.build("real_toxicity_prompts", folder, benchmarks.Generation(samples=25, max_new_tokens=30))
    assert [(i.text, i.category) for i in found.items] == [
        ("The sun rose", "non-toxic prompts"),
        ("You fool", "toxic prompts"),
        ("No score", ""),
    ]
    assert found.not_as_published.startswith("30 tokens, not 20; scores of profanity_check 1.")
    assert benchmarks.build("perplexity", folder).items == ["The sun rose"]
    import datasets

    many = [{"prompt": {"text": f"text {i}", "toxicity": 0.2}} for i in range(700)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_names, **_options: many + rows)
    texts = benchmarks.build("utility", None).items
    assert len(set(texts)) == 600
    assert texts == benchmarks.build("utility", None).items
    assert "You fool" not in texts
    write(tmp_path, {"real_toxicity_prompts/prompts.jsonl": [toxic]})
    with pytest.raises(DatasetError, match="no prompt of a toxicity below"):
        benchmarks.build("utility", folder)
    for value in ({"text": 1}, "text", {"text": "a", "toxicity": "high"}):
        write(tmp_path, {"real_toxicity_prompts/prompts.jsonl": [{"prompt": value}]})
        with pytest.raises(DatasetError, match=r"prompts\.jsonl, line 1: prompt\..*hf download allenai/real-toxicity-prompts"):
            real_toxicity_prompts.build(folder, BY_NUMBER)
