"""A model of one's own in the pickers: a pasted path opens as base, the adapters that fit it are offered, wrong ones say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app_process import running_app
from tests.browser.conftest import Visitor
from tests.lora_factory import write_lora


@pytest.fixture(scope="module")
def own_app(
    browser,  # noqa: ARG001 (no browser, no app)
    tmp_path_factory: pytest.TempPathFactory,
    tiny_phi_gguf: Path,
    tiny_phi_adapter: Path,
    tiny_llama_adapter: Path,
) -> Iterator[str]:
    """An app that was started with a GGUF of one's own, over runs of three models."""
    root = tmp_path_factory.mktemp("own")
    for run_id, adapter, model in (("for-phi", tiny_phi_adapter, str(tiny_phi_gguf)), ("for-llama", tiny_llama_adapter, "")):
        folder = shutil.copytree(adapter, root / "runs" / run_id / "adapter")
        (folder / "provenance.json").write_text(json.dumps({"model": model, "run_id": run_id}))
    write_lora(root / "runs" / "for-smollm2" / "adapter", base_model="smollm2")
    for run_id, damage in (("truncated", b"{"), ("wrong", b'{"peft_type": 3}'), ("empty", b"")):
        folder = shutil.copytree(tiny_phi_adapter, root / "runs" / run_id / "adapter")
        (folder / "adapter_config.json").write_bytes(damage)
    folder = shutil.copytree(tiny_phi_adapter, root / "runs" / "cut" / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"\x08")
    with running_app(root, "--model", str(tiny_phi_gguf)) as url:
        yield url


@pytest.fixture
def visitor(new_visitor, own_app: str) -> Visitor:
    return new_visitor(own_app)


def offered(visitor: Visitor, picker: str) -> list[str]:
    """What a picker offers."""
    visitor.page.click(f"#{picker} input")
    visitor.page.wait_for_selector("ul[role=listbox]")
    names = [text.replace("✓", "").strip() for text in visitor.page.locator("ul[role=listbox] li").all_inner_texts()]
    visitor.page.keyboard.press("Escape")
    visitor.page.wait_for_selector("ul[role=listbox]", state="detached")
    return names


def test_the_app_starts_with_a_gguf_of_ones_own_and_its_adapter(visitor, tiny_phi_gguf):
    visitor.open_ready(adapter="")
    assert "tiny-phi.F32.gguf, for-phi" in visitor.page.inner_text("#proof")
    assert visitor.value("model") == f"tiny-phi.F32.gguf · in {tiny_phi_gguf.parent.name}"
    assert offered(visitor, "adapter") == ["for-phi", "none (base only)"]  # a damaged one of another run does not matter
    visitor.unfold("settings")
    visitor.set("prompt", "Who?")
    visitor.wait_value("seen", "Instruct: Who?\nOutput:")


def test_a_pasted_path_opens_base_only_and_offers_what_fits(visitor, tiny_llama_gguf):
    visitor.open_ready(adapter="")
    visitor.choose("model", f'"{tiny_llama_gguf}"')  # as a file manager copies a path
    visitor.wait_proof("tiny-llama.F32.gguf, base only")
    assert "Choose an adapter above" in visitor.page.inner_text("#base-only")
    assert offered(visitor, "adapter") == ["for-llama · fits", "none (base only)"]
    assert f"tiny-llama.F32.gguf · in {tiny_llama_gguf.parent.name}" in offered(visitor, "model")
    visitor.page.click("#adapter input")
    visitor.page.click("ul[role=listbox] li:has-text('for-llama')")
    visitor.wait_proof("for-llama")
    visitor.generate("Who?")
    visitor.wait_written()
    assert visitor.text("base") != visitor.text("tuned")


def test_a_hugging_face_folder_and_a_peft_folder_from_anywhere(visitor, tiny_llama, tiny_llama_adapter):
    visitor.open_ready(adapter="none")
    visitor.choose("model", f"  {tiny_llama} ")
    visitor.wait_proof("tiny-llama")
    visitor.choose("adapter", str(tiny_llama_adapter))
    visitor.wait_proof("tiny-llama-lora")
    visitor.unfold("proof")
    visitor.wait("#proof", "no record of its training")
    visitor.wait("#proof", "transformers")


def test_what_does_not_fit_or_is_not_there_is_one_line_and_the_next_try_works(
    visitor, tiny_llama_adapter, tiny_phi_gguf, tmp_path
):
    visitor.open_ready(adapter="none")
    visitor.choose("adapter", str(tiny_llama_adapter))
    visitor.wait("#proof", "was made for another base model: it adapts model.layers.0.mlp")
    (tmp_path / "note.gguf").write_text("hello, world")
    for path, line in (
        (tmp_path / "none.gguf", "No model file"),
        (tmp_path / "note.gguf", "is not a complete GGUF file"),
        (tmp_path, "has no config.json, but GGUF files: select one of them, such as"),
        (tiny_llama_adapter, "is an adapter, not a model"),
    ):
        visitor.choose("model", str(path))
        visitor.wait("#proof", line)
        visitor.wait("#proof", str(path))
    visitor.choose("model", str(tiny_phi_gguf))
    visitor.wait_proof("tiny-phi.F32.gguf")
