"""The New run panel without a browser: fields to config and back, what matters when, sources, estimates in words."""

from __future__ import annotations

import pytest

from biasdpo import config as run_config
from biasdpo import models
from biasdpo.config import TrainConfig
from biasdpo.engines import Engine, EngineKey, EnginePool, Loading
from biasdpo.errors import ConfigError
from biasdpo.jobs.estimate import Estimate
from biasdpo.ui import train
from biasdpo.ui.train import DECIDING, SETTINGS, first_preset, presets_of
from biasdpo.workspace import Workspace

NOT_FIELDS = {"model", "datasets", "dataset_weights"}  # pickers of their own

CONFIG = TrainConfig(
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


def page_of(config: TrainConfig) -> list[object]:
    return train.from_config(config)


def test_every_setting_has_a_field_with_an_explanation():
    names = [setting.name for setting in SETTINGS]
    assert sorted(names) == sorted(set(TrainConfig.settings()) - NOT_FIELDS)
    fields = [train.build_field(one, train.to_field(one, one.default), True) for one in SETTINGS]
    assert all(field.label and field.info for field in fields)
    assert next(field.info for field in fields if field.label == "Max length").endswith("Range: 16 to 1000000 tokens.")


def test_fields_bring_back_the_config_that_they_show():
    assert TrainConfig(**train.to_values(page_of(CONFIG))) == CONFIG
    shown = train.form_values(page_of(CONFIG))
    assert shown["learning_rate"] == "5e-5"
    assert shown["loss_weights"] == "1, 0.5"
    assert shown["target_modules"] == "q_proj, o_proj"
    assert shown["probe_prompts"] == "Who leads?\nWho, then?"


@pytest.mark.parametrize("preset", run_config.presets(), ids=lambda preset: preset.id)
def test_every_shipped_preset_can_be_filled_in(preset):
    config = TrainConfig(**preset.values)
    values = train.to_values(page_of(config))
    assert TrainConfig(**values | {"model": config.model}) == config.replace(datasets=(), dataset_weights=())


def test_settings_without_an_effect_are_hidden_and_at_their_defaults():
    values = train.form_values(page_of(CONFIG))
    assert all(train.visible_settings(values).values())
    fewer = values | {"loss_type": ["sigmoid"], "max_steps": 7, "eval_every": 0, "probe_every": 0, "schedule": "constant"}
    effects = train.visible_settings(fewer)
    hidden = {name for name, effect in effects.items() if not effect}
    assert hidden == {"loss_weights", "label_smoothing", "epochs", "early_stopping", "keep", "probe_prompts", "warmup_share"}
    read = train.to_values([fewer[setting.name] for setting in SETTINGS])
    assert {name: read[name] for name in hidden} == {name: TrainConfig.settings()[name].default for name in hidden}
    TrainConfig(**read)  # a smoothing left over from `robust` would be refused


def test_what_matters_hangs_on_nothing_else_than_what_the_page_listens_to():
    values = train.form_values(page_of(CONFIG))
    deciding = {name: values[name] for name in DECIDING}
    assert train.visible_settings(deciding) == train.visible_settings(values)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("beta", "-1", "beta must be a number from 0.0001 to 1000: got -1.0"),
        ("beta", "hot", "beta must be a number from 0.0001 to 1000: got 'hot'"),
        ("beta", "", "beta must be a number from 0.0001 to 1000: got ''"),
        ("beta", "nan", "beta must be a number from"),
        ("learning_rate", "2", "learning_rate must be a number from 1e-9 to 1: got 2.0"),
        ("rank", 0, "rank must be a whole number from 1 to 512: got 0"),
        ("rank", 2.5, "rank must be a whole number from 1 to 512: got 2.5"),
        ("rank", None, "rank must be a whole number from 1 to 512: got None"),
        ("seed", -1, "seed must be a whole number"),
        ("target_modules", "", "target_modules is empty"),
        ("target_modules", "lm_head", "target_modules can't include 'lm_head'"),
        ("loss_type", [], "loss_type is empty"),
        ("loss_type", ["sft"], "loss_type needs a preference loss"),
        ("schedule", "steep", "schedule must be one of"),
        ("probe_prompts", "a\nb\nc\nd", "probe_prompts holds at most 3 values: got 4"),
        ("held_out_share", "0.9", "held_out_share must be a number from 0 to 0.5: got 0.9"),
    ],
)
def test_a_value_out_of_range_has_one_line(name, value, line):
    setting = next(setting for setting in SETTINGS if setting.name == name)
    assert train.problem(setting, value).startswith(line)


@pytest.mark.parametrize(
    ("name", "value"), [("beta", " 0.2 "), ("rank", 8.0), ("learning_rate", "5e-5"), ("loss_weights", "1, .5")]
)
def test_a_value_as_people_write_it_is_read(name, value):
    setting = next(setting for setting in SETTINGS if setting.name == name)
    assert train.problem(setting, value) == ""


def test_presets_of_a_model_and_of_its_likes(tmp_path, tiny_phi):
    assert [preset.id for preset in presets_of("smollm2")] == ["smollm2-quick", "smollm2-standard", "smollm2-thorough"]
    quick = first_preset("smollm2")
    assert quick is not None
    assert quick.id == "smollm2-quick"
    assert {preset.model for preset in presets_of(str(tiny_phi))} == {"phi-2"}  # the same architecture
    assert presets_of(str(tmp_path / "nothing")) == []


# Sources


def test_sources_with_weights():
    rows = train.read_rows(["workspace", 1, "", 5, "hub:owner/name", 2.5, None, 1])
    assert rows == [("workspace", 1.0), ("hub:owner/name", 2.5)]
    assert train.config_values(rows) == {"datasets": ("workspace", "hub:owner/name"), "dataset_weights": (1.0, 2.5)}
    assert train.config_values([("workspace", 1.0)])["dataset_weights"] == ()
    assert train.rows_of(("a", "b"), ()) == [("a", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["", 1], "No data to train on"),
        ([5, 1], "A data source is text"),
        (["workspace", None], "The weight of workspace must be a number"),
        (["workspace", 1, "workspace", 2], "workspace is named twice"),
        (["hub:nothing", 1], "hub:OWNER/NAME"),
        (["hub:../..", 1], "hub:OWNER/NAME"),
    ],
)
def test_rows_that_name_no_source(given, line):
    with pytest.raises(ConfigError, match=line):
        train.read_rows(given)


# In words


def estimate(**changes: object) -> Estimate:
    values: dict[str, object] = {
        "steps": 120,
        "pairs_train": 232,
        "pairs_held_out": 26,
        "dropped": 1,
        "cut": 2,
        "tokens_per_epoch": 52_110,
        "seconds_per_step": 1.31,
        "seconds_total": 200.0,
        "memory_bytes": 1_500_000_000,
        "memory_free_bytes": 6_000_000_000,
        "fits": True,
        "refusal": "",
        "device": "cpu",
        "measured_at": "2026-11-25T01:10:00+00:00",
        "parts": {"loading": 12.0, "training": 157.0, "probes": 0.0},
    }
    return Estimate(**values | changes)  # type: ignore[arg-type]


def test_an_estimate_in_words():
    html = train.estimate(estimate())
    for part in ("<b>3 min</b>", "120 of 1.3 s", "52,110", "<b>1.5 GB</b> at the peak, of 6 GB free", "1 pairs dropped, 2 cut"):
        assert part in html
    assert "width: 25.0%" in html  # 1.5 of 6 GB
    assert "loading 12 s · training 3 min" in html
    assert "bd-error" not in html


def test_an_estimate_that_can_not_fit_is_an_error_line():
    html = train.estimate(estimate(memory_bytes=9_000_000_000, fits=False, refusal="Needs <9> GB: lower batch_size"))
    assert '<div class="bd-error" role="alert">Needs &lt;9&gt; GB: lower batch_size</div>' in html
    assert "width: 100.0%" in html
    assert "left: 66.7%" in html  # 6 of 9 GB


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
