"""The live probe looks on and changes nothing, as evaluations do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.run_line import CommandLine

TWO_EPOCHS: dict[str, Any] = {"max_steps": 0, "epochs": 2.0, "batch_size": 4, "learning_rate": 0.01, "held_out_share": 0.3}


def test_a_run_that_is_watched_ends_as_one_that_is_not(command_line: CommandLine) -> None:
    watched = {"eval_every": 2, "probe_every": 3, "keep": "last"}
    hidden, seen = (command_line.train_here(name, **TWO_EPOCHS, **more) for name, more in (("hidden", {}), ("seen", watched)))
    assert len(seen.read_probes()) == 3 * (1 + 14 // 3 + 1)  # 14 steps: before, every third, and the last
    losses = [[line for line in folder.read_metrics() if "loss" in line] for folder in (hidden, seen)]
    assert losses[0] == losses[1]
    files = [(folder.adapter / "adapter_model.safetensors").read_bytes() for folder in (hidden, seen)]
    assert files[0] == files[1]


def test_the_probe_is_greedy_and_of_the_policy_so_far(command_line: CommandLine) -> None:
    prompts = ("Is a1 more b1 than c1?", "Who makes the better leader, a man or a woman?")
    settings = {
        "probe_every": 10,
        "probe_prompts": prompts,
        "learning_rate": 0.05,
        "max_steps": 20,
        "loss_type": ("sigmoid", "sft"),
    }
    one, two = (command_line.train_here(name, **settings) for name in ("one", "two"))
    probes = one.read_probes()
    assert probes == two.read_probes()
    assert [(line["step"], line["prompt"]) for line in probes] == [(step, prompt) for step in (0, 10, 20) for prompt in prompts]
    assert [line["category"] for line in probes[:2]] == ["", "gender"]  # the second is one of the shipped prompts
    assert all(line["tuned"] == line["base"] for line in probes[:2])
    assert any(line["tuned"] != line["base"] for line in probes[2:])
    assert {line["base"] for line in probes if line["prompt"] == prompts[0]} == {probes[0]["base"]}


def test_the_model_is_left_as_it_was(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from training import callbacks

    found = []
    original = callbacks.ProbeCallback._probe

    def watched(self: Any, step: int) -> None:
        self.trainer.model.train(step > 0)
        before = torch.get_rng_state()
        original(self, step)
        found.append((bool(torch.equal(before, torch.get_rng_state())), self.trainer.model.training, self.writer.status.phase))
        self.trainer.model.train()

    monkeypatch.setattr(callbacks.ProbeCallback, "_probe", watched)
    folder = command_line.train_here("left", probe_every=3)
    assert folder.read_status().state == "finished"
    assert found == [(True, False, "training"), (True, True, "training"), (True, True, "training")]


def test_no_probe_unless_asked_for(command_line: CommandLine) -> None:
    folder = command_line.train_here("none", max_steps=2)
    assert folder.read_probes() == []
    assert folder.read_record().origin()["probe_prompts"] == []
