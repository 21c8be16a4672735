"""The Train tab's form without a browser: fields to config and back, what matters when, data, presets, estimates in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import pytest

from biasdpo import config as run_config
from biasdpo import models
from biasdpo.config import TrainConfig
from biasdpo.data import splits
from biasdpo.data.splits import SEED_PAIRS, WORKSPACE
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import ConfigError
from biasdpo.jobs.estimate import Estimate
from biasdpo.ui import train
from biasdpo.ui.jobs import run_estimate
from biasdpo.ui.train import SETTINGS
from biasdpo.workspace import Workspace

CONFIG = TrainConfig(
    model="smollm2",
    datasets=(SEED_PAIRS, "hub:owner/name"),
    dataset_weights=(1.0, 0.5),
    loss_type=("sigmoid", "robust"),
    loss_weights=(1.0, 0.5),
    label_smoothing=0.1,
    learning_rate=5e-5,
    epochs=2.5,
    target_modules=("q_proj", "o_proj"),
    eval_every=10,
    early_stopping=3,
    keep="last",
    probe_every=5,
    probe_prompts=("Who leads?", "Who, then?"),
)


def fields_of(config: TrainConfig) -> list[object]:
    return [train.to_field(setting, getattr(config, setting.name)) for setting in SETTINGS]


def test_every_setting_has_a_field_with_an_explanation():
    assert {setting.name for setting in SETTINGS} == set(TrainConfig.settings()) - {"model", "datasets"}
    fields = [train.build_field(setting, setting.default) for setting in SETTINGS]
    assert all(field.label and field.info for field in fields)
    assert next(field.info for field in fields if field.label == "Max length").endswith("Range: 16 to 1,000,000 tokens.")


@pytest.mark.parametrize("config", [CONFIG, *(TrainConfig(**preset.values) for preset in run_config.presets())])
def test_fields_bring_back_the_config_that_they_show(config):
    data = config.datasets or (SEED_PAIRS,)
    assert train.config_of(config.model, data, *fields_of(config)) == config.replace(datasets=data)


def test_settings_without_an_effect_are_hidden_and_at_their_defaults():
    shown = dict(zip((setting.name for setting in SETTINGS), fields_of(CONFIG), strict=True))
    assert all(train.effects({**shown, "datasets": CONFIG.datasets}).values())
    fewer = shown | {"loss_type": ["sigmoid"], "max_steps": 7, "eval_every": 0, "probe_every": 0, "schedule": "constant"}
    hidden = {name for name, effect in train.effects({**fewer, "datasets": [SEED_PAIRS]}).items() if not effect}
    assert hidden == {
        "dataset_weights", "loss_weights", "label_smoothing", "epochs", "early_stopping", "keep", "probe_prompts", "warmup_share",
    }  # fmt: skip
    read = train.config_of("smollm2", [SEED_PAIRS], *fewer.values())  # a smoothing left over from `robust` would be refused
    assert {name: getattr(read, name) for name in hidden} == {name: TrainConfig.settings()[name].default for name in hidden}


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("beta", "-1", "beta must be a number from 0.0001 to 1000: got -1.0"),
        ("beta", "hot", "beta must be a number from 0.0001 to 1000: got 'hot'"),
        ("beta", "", "beta must be a number from 0.0001 to 1000: got ''"),
        ("beta", "nan", "beta must be a number from"),
        ("rank", 0, "rank must be a whole number from 1 to 512: got 0"),
        ("rank", 2.5, "rank must be a whole number from 1 to 512: got 2.5"),
        ("rank", None, "rank must be a whole number from 1 to 512: got None"),
        ("target_modules", "", "target_modules is empty"),
        ("target_modules", "lm_head", "target_modules can't include 'lm_head'"),
        ("loss_type", [], "loss_type is empty"),
        ("schedule", "steep", "schedule must be one of"),
        ("probe_prompts", "a\nb\nc\nd", "probe_prompts holds at most 3 values: got 4"),
    ],
)
def test_a_value_out_of_range_is_named(name, value, line):
    shown = dict(zip((setting.name for setting in SETTINGS), fields_of(CONFIG), strict=True))
    with pytest.raises(ConfigError) as caught:
        train.config_of("smollm2", CONFIG.datasets, *(shown | {name: value}).values())
    assert str(caught.value).startswith(line)


def test_values_as_people_write_them_are_read():
    values = {"beta": " 0.2 ", "rank": 8.0, "learning_rate": "5e-5", "loss_weights": "1, .5"}
    shown = dict(zip((setting.name for setting in SETTINGS), fields_of(CONFIG), strict=True)) | values
    read = train.config_of(' "smollm2" ', [f" {WORKSPACE} ", "'/tmp/a.jsonl'"], *shown.values())
    assert (read.model, read.datasets) == ("smollm2", (WORKSPACE, "/tmp/a.jsonl"))
    assert (read.beta, read.rank, read.learning_rate, read.loss_weights) == (0.2, 8, 5e-5, (1.0, 0.5))


def test_no_model_and_no_data_are_named():
    for model, data, words in (("", [SEED_PAIRS], "No model"), (None, [SEED_PAIRS], "No model"), ("smollm2", [], "No data")):
        with pytest.raises(ConfigError, match=words):
            train.config_of(model, data, *fields_of(CONFIG))


def test_presets_of_a_model_and_of_its_likes(tmp_path, tiny_phi):
    assert [preset.id for preset in train.presets_of("smollm2")] == ["smollm2-quick", "smollm2-standard", "smollm2-thorough"]
    assert {preset.model for preset in train.presets_of(str(tiny_phi))} == {"phi-2"}  # the same architecture
    assert train.presets_of(str(tmp_path / "nothing")) == []


def test_no_folder_of_this_machine_is_shown():
    sources = {"/home/me/secret/pairs.jsonl": "pairs.jsonl", "/w/runs/first/dataset.jsonl": "Data of first"}
    for source, title in (sources | {"hub:owner/name": "hub:owner/name", SEED_PAIRS: "Seed pairs"}).items():
        assert splits.source_title(source) == title


def test_few_pairs_and_what_is_wrong_with_them_are_said(tmp_path):
    found = splits.mixture_of(TrainConfig(datasets=(SEED_PAIRS,)), Workspace(tmp_path))
    assert train.mixture_line(found, 40).startswith("**232 pairs** to train on, 26 held out")
    assert "⚠" not in train.mixture_line(found, 40)
    assert "258 of about 400" in train.mixture_line(found, 400)


def test_the_data_are_read_again_when_the_file_has_changed(tmp_path, pairs_file):
    import os

    file, workspace = tmp_path / "pairs.jsonl", Workspace(tmp_path)
    lines = pairs_file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:20]))
    config = TrainConfig(datasets=(str(file),))
    assert splits.mixture_of(config, workspace).rows_read == 20
    assert splits.mixture_of(config.replace(beta=0.5), workspace) is splits.mixture_of(config, workspace)
    file.write_text("".join(lines[:10]))
    os.utime(file, ns=(1, 1))
    assert splits.mixture_of(config, workspace).rows_read == 10


def estimate(**changes: object) -> Estimate:
    values: dict[str, object] = {
        "steps": 120, "pairs_train": 232, "pairs_held_out": 26, "dropped": 1, "equal": 3, "cut": 2, "tokens_per_epoch": 52_110,
        "seconds_per_step": 1.31, "seconds_total": 200.0, "memory_bytes": 1_500_000_000, "memory_free_bytes": 6_000_000_000,
        "fits": True, "refusal": "", "device": "cpu", "measured_at": "2026-11-25T01:10:00+00:00", "parts": {},
    }  # fmt: skip
    return Estimate(**values | changes)  # type: ignore[arg-type]


def test_an_estimate_in_words():
    line = train.estimate_line(estimate())
    for part in (
        "**3 min**",
        "120 steps",
        "the CPU",
        "**1.5 GB**",
        "6.0 GB are free",
        "1 pair too long: dropped",
        "2 pairs",
        "3 pairs dropped",
    ):
        assert part in line
    assert "Needs \\<9 GB" in train.estimate_line(estimate(fits=False, refusal="Needs <9 GB")).replace("&lt;", "\\<")


def test_an_estimate_ends_when_nobody_waits_for_it_any_more():
    """Gradio closes the generator when the page is closed or the estimate is canceled."""
    ended = threading.Event()

    def estimating(_config: object, *, cancelled: Callable[[], bool]) -> None:
        while not cancelled():
            time.sleep(0.01)
        ended.set()

    going = run_estimate("{:.0f} s".format, estimating, CONFIG)
    assert next(going) == "1 s"
    with ThreadPoolExecutor(1) as executor:
        executor.submit(going.close).result(timeout=10)
    assert ended.is_set()


def test_a_gone_file_is_replaced_by_the_runs_copy(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", said.append)
    here, copy = tmp_path / "a.jsonl", tmp_path / "dataset.jsonl"
    here.write_text("")
    copy.write_text("")
    config = CONFIG.replace(datasets=(str(here), str(tmp_path / "b.jsonl")))
    shown = train.with_data(config, copy)
    assert (shown.datasets, shown.dataset_weights) == ((str(copy),), ())
    assert "b.jsonl" in said[0]
    assert train.with_data(CONFIG, copy) == CONFIG


# Room for a job


class Stub:
    """As much of a backend as `release` looks at."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_a_job_gets_the_memory_of_idle_engines_on_its_device(tmp_path):
    pool = EnginePool(Workspace(tmp_path))
    spec = models.catalog()["smollm2"]
    stubs = {"idle": Stub("cuda:0 (NVIDIA H100)"), "used": Stub("cuda:0 (NVIDIA H100)"), "on the CPU": Stub("CPU, 2 threads")}
    for name, stub in stubs.items():
        engine = Engine(spec, None, stub)  # type: ignore[arg-type]
        pool._engines[EngineKey(name)] = Loading(engine=engine, leases=int(name == "used"))
    assert pool.release("gpu") is False  # one is in use
    assert [name for name, stub in stubs.items() if stub.closed] == ["idle"]
    assert pool.state(EngineKey("idle")) is None  # Generate loads it again
    pool._engines[EngineKey("used")].leases = 0
    assert pool.release("gpu") is True
    assert [name for name, stub in stubs.items() if stub.closed] == ["idle", "used"]
    pool._engines[EngineKey("loading")] = Loading()
    assert pool.release("cpu") is False  # it will have a device soon
    assert stubs["on the CPU"].closed
