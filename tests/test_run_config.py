"""The run config: every field is documented and checked; the shipped files are good; what is saved is read back equal."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from biasdpo import config as run_config
from biasdpo import models
from biasdpo.config import TrainConfig
from biasdpo.errors import ConfigError
from biasdpo.jobs import worker
from biasdpo.jobs.job import JobFolder

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "training" / "configs").glob("*.toml"))


def test_some_configs_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"smollm2-quick", "smollm2-standard"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_good(path: Path) -> None:
    config = run_config.load_toml(path)
    assert config.model in models.catalog()
    assert path.stem.startswith(config.model)
    assert config.datasets == ()  # the user names the data


def test_every_field_is_documented() -> None:
    documented = re.findall(r"^    (\w+) +\S", TrainConfig.__doc__ or "", re.MULTILINE)
    assert set(documented) == {field.name for field in fields(TrainConfig)}


def test_saved_config_is_read_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(model="m", datasets=("a", "b"), loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5), seed=0, beta=0.25)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    assert run_config.load_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0}, "beta must be a number from 0.0001 to 1000: got 0"),
        ({"beta": "high"}, "beta must be a number"),
        ({"beta": float("nan")}, "beta must be a number"),
        ({"learning_rate": -1e-4}, "learning_rate must be"),
        ({"rank": 0}, "rank must be a whole number from 1 to 512: got 0"),
        ({"rank": 8.5}, "rank must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"held_out_share": 0.6}, "held_out_share must be"),
        ({"loss_type": ["sigmoid", "dpo"]}, "loss_type must be one of sigmoid, .*got 'dpo'"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sft"]}, "a preference loss beside 'sft'"),
        ({"loss_weights": [1.0, 2.0]}, "one weight a loss type: got 2 for 1"),
        ({"label_smoothing": 0.1}, "loss_type 'robust' alone"),
        ({"schedule": "wavy"}, "schedule must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"save_steps": 50, "logging_steps": 8}, "multiple of logging_steps: got 50 and 8; use 48"),
        ({"max_length": 4}, "max_length must be"),
        ({"strength": 2.0}, "strength must be"),
        ({"adapter_dtype": "int4"}, "adapter_dtype must be one of"),
        ({"learning_rte": 1e-4}, "Unknown setting 'learning_rte': choose one of model, "),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config.from_mapping(values)


def test_settings_from_the_command_line() -> None:
    values = run_config.parse_settings(["beta=0.2", "model=smollm2", 'loss_type=["sigmoid", "sft"]', "schedule=cosine", "rank=4"])
    config = run_config.from_mapping(values)
    assert (config.beta, config.model, config.loss_type, config.schedule, config.rank) == (
        0.2,
        "smollm2",
        ("sigmoid", "sft"),
        "cosine",
        4,
    )
    assert run_config.from_mapping({"loss_type": "ipo", "beta": 1}).loss_type == ("ipo",)
    with pytest.raises(ConfigError, match="--set wants key=value: got 'beta'"):
        run_config.parse_settings(["beta"])


def test_a_bad_toml_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No config file"):
        run_config.load_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("beta = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="as TOML") as caught:
        run_config.load_toml(tmp_path / "bad.toml")
    assert "\n" not in str(caught.value)


def test_every_setting_is_explained_in_a_line() -> None:
    explained = run_config.explained()
    assert list(explained) == [field.name for field in fields(TrainConfig)]
    assert explained["seed"] == "of the order of rows and the LoRA's start"
    assert explained["dataset_weights"].startswith("how often a source's training pairs are seen an epoch")
    assert explained["dataset_weights"].endswith("Held-out pairs count once")
    assert not [text for text in explained.values() if "\n" in text or "  " in text]


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("beta", 0.2, 0, "beta must be a number from 0.0001"),
        ("seed", 0, -1, "seed must be a whole number"),
        ("loss_type", ["sigmoid", "sft"], ["dpo"], "loss_type must be one of"),
        ("loss_type", "ipo", ["ipo", "ipo"], "names a loss twice"),
        ("dataset_weights", [2, 0.5], [0], "dataset_weights must be a number from 0.01 to 10"),
        ("keep", "last", "first", "keep must be one of best, last"),
        ("early_stopping", 3, 1.5, "early_stopping must be a whole number"),
        ("probe_prompts", ["Who?"] * 3, ["Who?"] * 4, "at most 3 prompts: got 4"),
        ("probe_prompts", [], [" "], "got ' ' in it"),
        ("target_modules", ["q_proj"], ["lm_head"], "can't hold 'lm_head'"),
        ("model", "smollm2", 3, "model must be text"),
    ],
)
def test_one_setting_is_checked_alone(name: str, good: Any, bad: Any, message: str) -> None:
    run_config.check_setting(name, good)
    with pytest.raises(ConfigError, match=message):
        run_config.check_setting(name, bad)


def test_an_unknown_setting_is_refused_alone() -> None:
    with pytest.raises(ConfigError, match="Unknown setting 'betta'"):
        run_config.check_setting("betta", 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early_stopping": 2}, "early_stopping needs evaluations: got 2 with eval_every 0"),
        ({"datasets": ["a", "b"], "dataset_weights": [1.0]}, "one weight a dataset: got 1 for 2"),
        ({"accelerate": "fsdp"}, "accelerate 'fsdp' is for several processes: got num_processes 1; set num_processes"),
        ({"accelerate": "multi_gpu", "num_processes": 1}, "'multi_gpu' is for several processes: got num_processes 1"),
    ],
)
def test_settings_that_need_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config.from_mapping(values)


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
    asked = run_config.from_mapping({"accelerate": accelerate, "num_processes": processes})
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

    assert path.stem in run_config.ACCELERATE_CONFIGS
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
