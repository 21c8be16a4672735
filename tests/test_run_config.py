"""Settings: declared once, checked with one line, written and read back equal; how a run's processes are launched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from biasdpo import config as run_config
from biasdpo.config import EvaluationConfig, ExportConfig, ServeConfig, Settings, TrainConfig
from biasdpo.errors import ConfigError
from biasdpo.jobs import worker
from biasdpo.jobs.job import JobFolder

ROOT = Path(__file__).resolve().parent.parent

CHANGED = TrainConfig(
    model="m",
    datasets=("a, b.jsonl", "hub:c/d"),
    loss_type=("sigmoid", "sft"),
    loss_weights=(1.0, 0.5),
    learning_rate=1.25e-5,
    beta=1,
    probe_every=5,
    probe_prompts=("Who leads?", "Who, then?"),
)


@pytest.mark.parametrize("model", [TrainConfig, EvaluationConfig, ExportConfig, ServeConfig])
def test_every_setting_is_explained_and_in_the_json_schema(model: type[Settings]) -> None:
    schema = model.model_json_schema()["properties"]
    for name, one in model.settings().items():
        assert one.help.endswith("."), name
        assert schema[name]["description"]
        assert all(when in model.settings() for when in one.when)
    assert len({one.option for one in model.settings().values()}) == len(schema)


def test_a_declaration_reaches_schema_and_range() -> None:
    beta = TrainConfig.model_json_schema()["properties"]["beta"]
    assert (beta["minimum"], beta["maximum"], beta["default"], beta["group"]) == (1e-4, 1000, 0.1, "Essentials")
    weights = TrainConfig.settings()["dataset_weights"]
    assert (weights.kind, weights.is_list, weights.range, weights.option) == ("number", True, "0.01 to 10", "--dataset-weights")
    limit = EvaluationConfig.settings()["limit"]
    assert (limit.kind, limit.is_optional, limit.default) == ("integer", True, None)


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED])
def test_a_config_is_read_back_equal_from_json_toml_and_text(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    assert run_config.load_json(tmp_path / "config.json") == config
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert TrainConfig(**run_config.read_toml(tmp_path / "config.toml")) == config
    settings = TrainConfig.settings()
    assert TrainConfig(**{name: settings[name].parse(settings[name].format(value)) for name, value in config}) == config


def test_lists_numbers_and_single_values_take_the_types_of_their_fields() -> None:
    config = TrainConfig(**{"loss_type": "ipo", "beta": 1, "datasets": ["a", "b"]})
    assert (config.loss_type, config.datasets, repr(config.beta)) == (("ipo",), ("a", "b"), "1.0")
    assert hash(config) == hash(config.replace())
    assert config.changed() == {"datasets": ("a", "b"), "loss_type": ("ipo",), "beta": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be a number from 0.0001 to 1000: got 0; choose a value in that range"),
        ({"beta": "high"}, "beta must be a number from 0.0001 to 1000: got 'high'"),
        ({"beta": float("nan")}, "beta must be a number"),
        ({"beta": True}, "beta must be a number"),
        ({"beta": None}, "beta must be a number"),
        ({"rank": 0}, "rank must be a whole number from 1 to 512: got 0"),
        ({"rank": 8.0}, "rank must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"model": 3}, "model must be text: got 3"),
        ({"dataset_weights": [0]}, "dataset_weights must be a number from 0.01 to 10: got 0"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type must be one of sigmoid, .*got 'dpo'"),
        ({"loss_type": []}, "loss_type is empty: name at least one"),
        ({"loss_type": ["sft"]}, "a preference loss beside 'sft'"),
        ({"loss_type": ["ipo", "ipo"]}, "names a value twice: got ipo, ipo"),
        ({"schedule": "wavy"}, "schedule must be one of linear, .*got 'wavy'"),
        ({"target_modules": "lm_head"}, "target_modules can't include 'lm_head'"),
        ({"probe_prompts": ["Who?"] * 4}, "holds at most 3 values: got 4"),
        ({"probe_prompts": [" "]}, "probe_prompts must be text, not blank: got ' '"),
    ],
)
def test_a_bad_value_is_one_line_whatever_the_other_settings_are(values: dict[str, Any], message: str) -> None:
    ((name, value),) = values.items()
    for refuse in (lambda: TrainConfig(**values), lambda: TrainConfig.check_setting(name, value)):
        with pytest.raises(ConfigError, match=message) as caught:
            refuse()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_weights": [1.0, 2.0]}, "one weight per loss type: got 2 for 1"),
        ({"datasets": ["a", "b"], "dataset_weights": [1.0]}, "one weight per dataset: got 1 for 2"),
        ({"label_smoothing": 0.1}, "loss type 'robust' only"),
        ({"early_stopping": 2}, "early_stopping needs evaluations: got 2 with eval_every 0"),
        ({"accelerate": "fsdp"}, "accelerate 'fsdp' is for several processes: got num_processes 1; set num_processes"),
        ({"save_steps": 50, "logging_steps": 8}, "multiple of logging_steps: got 50 and 8; use 48"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)
    for name, value in values.items():
        TrainConfig.check_setting(name, value)  # each is fine by itself


@pytest.mark.parametrize("values", [{"learning_rte": 1e-4}, {"learning_rte": 1e-4, "beta": -1}, {"self": 1}])
def test_an_unknown_setting_lists_the_known_ones(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"Unknown setting '(learning_rte|self)': choose one of model, datasets, "):
        TrainConfig(**values)


def test_settings_from_the_command_line() -> None:
    values = run_config.parse_settings(["beta=0.2", "model=smollm2", 'loss_type=["sigmoid", "sft"]', "schedule=cosine", "rank=4"])
    assert values == {"beta": 0.2, "model": "smollm2", "loss_type": ["sigmoid", "sft"], "schedule": "cosine", "rank": 4}
    with pytest.raises(ConfigError, match="--set needs key=value: got 'beta'"):
        run_config.parse_settings(["beta"])


def test_a_file_that_is_no_config_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    with pytest.raises(ConfigError, match="No config file"):
        run_config.read_toml(bad)
    bad.write_text("beta = ", encoding="utf-8")
    for read in (run_config.read_toml, run_config.load_json):
        with pytest.raises(ConfigError, match="Can't read") as caught:
            read(bad)
        assert "\n" not in str(caught.value)
    bad.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a JSON object"):
        run_config.load_json(bad)


@pytest.mark.parametrize(
    ("accelerate", "processes", "device", "config", "flags"),
    [
        ("auto", 1, "cpu", "cpu", []),
        ("auto", 2, "cpu", "cpu", ["--num_processes", "2", "--main_process_port", "0", "--multi_gpu"]),
        ("auto", 1, "gpu", "one_gpu", []),
        ("auto", 2, "gpu", "multi_gpu", ["--num_processes", "2", "--main_process_port", "0"]),
        ("fsdp", 2, "gpu", "fsdp", ["--num_processes", "2", "--main_process_port", "0"]),
    ],
)
def test_as_many_processes_are_launched_as_are_asked_for(
    accelerate: str, processes: int, device: str, config: str, flags: list[str]
) -> None:
    asked = TrainConfig(**{"accelerate": accelerate, "num_processes": processes})
    file = ROOT / "training" / "accelerate" / f"{config}.yaml"
    assert worker.launch_command(JobFolder(Path("/w/runs/x")), asked, device, 3) == [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *("--num_cpu_threads_per_process", "3", *flags, "-m", "training", "/w/runs/x"),
    ]
    if not flags:  # the file's own number counts
        assert "num_processes: 1\n" in file.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By accelerate's own loader, and as its launcher reads it for a command: every key is an argument that it knows."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert path.stem in TrainConfig.settings()["accelerate"].choices
    config = load_config_from_file(str(path))
    assert config.use_cpu is (path.stem == "cpu")
    assert config.distributed_type.value == {"multi_gpu": "MULTI_GPU", "fsdp": "FSDP"}.get(path.stem, "NO")

    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(config.fsdp_config) <= known
    several = ["--num_processes", "4"] if path.stem in ("multi_gpu", "fsdp") else []
    args, _defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), *several, "-m", "training", "x"])
    )
    assert (args.use_fsdp, args.multi_gpu, args.use_cpu) == (path.stem == "fsdp", path.stem == "multi_gpu", path.stem == "cpu")
    assert args.mixed_precision == "no"
    if path.stem == "fsdp":
        for name, value in prepare_multi_gpu_env(args).items():
            monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
