"""The cache of reference log-probabilities: computed once, never trusted when damaged."""

from __future__ import annotations

import json

import pytest

from biasdpo.workspace import sha256_of
from tests import tiny_trainer
from tests.gguf_files import spec_of
from tests.tiny_trainer import build_tiny_trainer, losses_of
from training.dpo import base_sha256
from training.reference import ReferenceCache, groups, open_cache, row_key

ROWS = tiny_trainer.ROWS[:3]


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "reference" / "base.json")


# The file


def test_what_was_added_is_found(cache):
    assert cache.load() == {}
    cache.add({"a": [(-10.123456789, -20.5)]})
    cache.add({"b": [(-1.0, -2.0), (-3.0, -4.0)]})
    assert cache.load() == {"a": [(-10.123456789, -20.5)], "b": [(-1.0, -2.0), (-3.0, -4.0)]}
    assert [path.name for path in cache.path.parent.iterdir() if path.suffix == ".json"] == ["base.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda _text: "",
        lambda text: text.replace("-20.5", "-20.6"),  # which the checksum does not fit
        lambda text: text.replace("-20.5", "NaN"),
        lambda _text: json.dumps({"groups": {"a": [[-10.0, -20.5]]}}),  # no checksum
        lambda _text: json.dumps({"sha256": "", "groups": {"a": [[-10.0]]}}),
        lambda _text: "[1, 2]",
        lambda text: "\x00" * len(text),
    ],
)
def test_a_damaged_file_is_empty_and_replaced(cache, damage):
    cache.add({"a": [(-10.0, -20.5)]})
    cache.path.write_text(damage(cache.path.read_text()))
    assert cache.load() == {}
    cache.add({"b": [(-1.0, -2.0)]})
    assert cache.load() == {"b": [(-1.0, -2.0)]}


def test_whatever_changes_the_numbers_has_a_file_or_a_key_of_its_own(tmp_path):
    a, b = "a" * 64, "b" * 64
    settings = [(a, "cpu", 1), (b, "cpu", 1), (a, "cuda", 1), (a, "cpu", 2)]
    assert len({open_cache(tmp_path, *setting).path.name for setting in settings}) == 4
    assert open_cache(tmp_path, a, "cuda", 1).path == open_cache(tmp_path, a, "cuda", 2).path
    moved = {"prompt_ids": [40, 41], "chosen_ids": [42, 50, 51, 2], "rejected_ids": [60, 2]}  # the same tokens, split elsewhere
    assert row_key(dict(ROWS[0])) == row_key(ROWS[0])
    assert len({row_key(row) for row in [*ROWS, moved]}) == 4


def test_the_base_is_the_files_that_are_trained(tiny_llama, tiny_llama_gguf):
    """Of a model that is here in both forms: the folder, as in `hf_copy`."""
    base = base_sha256(spec_of(tiny_llama, tiny_llama_gguf))
    assert base == sha256_of(tiny_llama / "model.safetensors")
    assert base_sha256(spec_of(tiny_llama_gguf)) == sha256_of(tiny_llama_gguf)


# Groups


def many_rows(count):
    return {row_key(row): row for row in ({"prompt_ids": [5], "chosen_ids": [i, 2], "rejected_ids": [2]} for i in range(count))}


def test_every_row_is_in_one_group_whatever_the_order():
    rows = many_rows(200)
    found = list(groups(rows))
    assert sorted(key for group in found for key in group.keys) == sorted(rows)
    assert all(rows[key] is row for group in found for key, row in zip(group.keys, group.rows, strict=True))
    assert [g.keys for g in groups(dict(reversed(rows.items())))] == [g.keys for g in found]
    assert 200 / 14 < len(found) < 200 / 4  # eight rows each, on average
    long_rows = {row_key(r): r for r in ({"prompt_ids": [7] * 1000, "chosen_ids": [i], "rejected_ids": [i]} for i in range(20))}
    assert max(len(group.rows) for group in groups(long_rows)) == 3  # 3 * 1002 >= 2048


def test_one_row_more_changes_its_own_group_alone():
    before = {group.key for group in groups(many_rows(200))}
    after = {group.key for group in groups(many_rows(201))}
    assert len(before - after) <= 1
    assert 1 <= len(after - before) <= 2  # two, where the new row ends a group


# The trainer


@pytest.fixture
def trainer_of(tiny_llama, tmp_path):
    """build(rows, ...) -> a trainer, and a list that gets the batch size of every reference forward."""

    def build(rows=ROWS, **settings):
        trainer = build_tiny_trainer(tiny_llama, tmp_path / "out", rows, **settings)
        trainer.forwards = []
        compute = trainer.compute_ref_log_probs

        def counted(model, inputs):
            trainer.forwards.append(len(inputs["input_ids"]))
            return compute(model, inputs)

        trainer.compute_ref_log_probs = counted
        return trainer

    return build


def ignore(_done, _total):
    pass


def columns(trainer):
    return trainer.train_dataset["ref_chosen_logps"][:], trainer.train_dataset["ref_rejected_logps"][:]


def test_each_row_is_computed_once_and_gives_the_losses_of_references_in_every_step(trainer_of, cache):
    first = trainer_of([*ROWS, ROWS[0]], eval_rows=[ROWS[1]])
    first.use_reference(cache, ignore)
    # Three different rows, of which one comes twice, and one to evaluate; two completions each.
    assert sum(first.forwards) == 2 * (3 + 1)
    cached, in_step = (trainer_of(num_train_epochs=2, rank=8, seed=7) for _ in range(2))
    cached.use_reference(cache, ignore)
    cached.train()
    assert cached.forwards == []  # whatever the rank and the seed
    assert columns(cached)[0] == columns(first)[0][:3]
    in_step.train()
    ours, theirs = map(losses_of, (cached, in_step))
    assert len(ours) == 6
    assert ours[0] == pytest.approx(0.6931, abs=1e-4)  # policy = reference: -log(1/2)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[-1] - 0.6931) > 1e-3


def test_a_warm_cache_gives_the_numbers_of_a_cold_one(trainer_of, tmp_path):
    """Otherwise the last digits of a run's adapter would depend on what other runs had left in the cache."""
    rows = list(many_rows(30).values())
    found = []
    for name, before in (("cold", []), ("warm", rows[:17])):
        cache = ReferenceCache(tmp_path / f"{name}.json")
        if before:
            trainer_of(before).use_reference(cache, ignore)
        trainer = trainer_of(rows)
        trainer.use_reference(cache, ignore)
        found.append(columns(trainer))
    assert found[0] == found[1]  # to the last digit


def test_what_was_computed_before_a_stop_is_kept_and_what_is_damaged_is_computed_again(trainer_of, cache):
    class Stop(Exception):  # noqa: N818
        pass

    rows = many_rows(40)
    sizes = [len(group.rows) for group in groups(rows)]
    assert len(sizes) > 2

    def stop(done, total):
        assert (done, total) == (sizes[0], 40)
        raise Stop

    with pytest.raises(Stop):
        trainer_of(list(rows.values())).use_reference(cache, stop)
    assert [len(logps) for logps in cache.load().values()] == sizes[:1]
    progress = []
    trainer_of(list(rows.values())).use_reference(cache, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (40 - sizes[0], 40 - sizes[0])
    assert len(progress) == len(sizes) - 1
    good = cache.load()
    cache.path.write_bytes(cache.path.read_bytes()[:-40])
    again = trainer_of(list(rows.values()))
    again.use_reference(cache, ignore)
    assert sum(again.forwards) == 2 * 40
    assert cache.load() == good


def test_an_evaluation_on_other_rows_finds_its_reference_too(trainer_of, cache):
    from datasets import Dataset

    trainer = trainer_of(ROWS[:2])
    trainer.use_reference(cache, ignore)
    metrics = trainer.evaluate(Dataset.from_list(ROWS[2:]))
    assert metrics["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert sum(map(len, cache.load().values())) == 3
