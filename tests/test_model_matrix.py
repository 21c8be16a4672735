"""Models, tokenizers, chat templates and adapters of other people, against transformers, PEFT and llama.cpp."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM

from biasdpo import models
from biasdpo.backends import hf_loading
from biasdpo.backends.base import kl_by_position
from biasdpo.backends.hf import open_transformers
from biasdpo.backends.llamacpp import Model, open_llamacpp
from biasdpo.chat import BARE, PromptTemplate, Segment, chat_template, encode_jointly, verified
from biasdpo.config import TrainConfig
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import AdapterError, ModelError, PromptError
from biasdpo.gguf import export, write
from biasdpo.gguf.proof import prove
from biasdpo.jobs.job import JobFolder
from biasdpo.model_files import named_tokens, read_header, special_tokens
from biasdpo.models import AdapterSpec
from biasdpo.records import LikelihoodRequest, Sampling
from biasdpo.workspace import Workspace
from tests import model_matrix, tiny_models
from tests.hf.cases import read
from tests.model_matrix import ADAPTERS, KINDS, NO_SYSTEM, NOT_EXPORTED, NOT_IN_OLLAMA, TEMPLATES, Kind
from training.callbacks import ProbeCallback, adapter_tensors
from training.dpo import build_trainer, load_policy
from training.rows import tokenize, tokenize_run
from training.status import StatusWriter

PROMPT, COMPLETION = "Why are  nurses always women?\n日本 1234", "They are not: nursing is open\nto everyone."
BY_NAME = {kind.name: kind for kind in KINDS}
SUPPORTED = [kind.name for kind in KINDS if not kind.refused]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("matrix")
    return {kind.name: model_matrix.save(kind, root / str(i)) for i, kind in enumerate(KINDS)}


def reference(tokenizer: Any, *contents: str, system: str = "", ask: bool = True) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    return ids


def template_of(folder: Path, tokenizer: Any, kind: Kind) -> PromptTemplate:
    """As the app reads it; of a model that it refuses, from the tokenizer."""
    if not kind.refused:
        return models.find(str(folder)).template
    with pytest.raises(ModelError, match=kind.refused):
        models.find(str(folder))
    return verified(chat_template(tokenizer.get_chat_template(), (), tokenizer.special_tokens_map))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("kind_of_template", TEMPLATES)
def test_tokens(name: str, kind_of_template: str, folders: dict[str, Path]) -> None:
    """Prompts, system prompts, conversations and training rows, as apply_chat_template has them."""
    folder, source = folders[name], TEMPLATES[kind_of_template]
    model_matrix.set_template(folder, source)
    tokenizer = hf_loading.load_tokenizer(folder)
    template = template_of(folder, tokenizer, BY_NAME[name])
    if BY_NAME[name].eos is None and "eos_token" in str(source):
        with pytest.raises(PromptError, match="'eos_token' is undefined"):  # as in transformers
            hf_loading.encode_prompt(tokenizer, template, PROMPT, "", [("Hi", "Hello")])
        return
    assert hf_loading.encode_prompt(tokenizer, template, PROMPT) == reference(tokenizer, PROMPT)
    turns = [("Hi {prompt}", "Hello.")]
    assert hf_loading.encode_prompt(tokenizer, template, PROMPT, "", turns) == reference(tokenizer, *turns[0], PROMPT)
    if kind_of_template in NO_SYSTEM:
        with pytest.raises(PromptError, match="no system role"):
            hf_loading.encode_prompt(tokenizer, template, PROMPT, "Be kind.")
    else:
        expected = reference(tokenizer, PROMPT, system="Be kind.")
        assert hf_loading.encode_prompt(tokenizer, template, PROMPT, "Be kind.") == expected
        assert expected != reference(tokenizer, PROMPT)
    # What a user types is text, and comes back as it was typed.
    typed = "stop <|im_end|></s> {prompt} <|tail|>"
    rendered = template.render(typed)
    assert [s.text for s in rendered if s.special] == [s.text for s in template.render("a") if s.special]
    assert kind_of_template == "tojson" or typed in template.render_text(typed)
    # What is trained on is what the template writes after the prompt, up to its end.
    [row] = tokenize([PreferencePair(PROMPT, COMPLETION, "x")], tokenizer, template, 512).rows
    conversation = reference(tokenizer, PROMPT, COMPLETION, ask=False)
    assert tokenizer.decode(row.chosen_ids[:-1]).strip() == COMPLETION
    whole = row.prompt_ids + row.chosen_ids
    if template.end and not kind_of_template.startswith(("tojson", "Llama 2")):  # ' ' before eos is not trained on
        assert whole == conversation[: len(whole)]
    elif not template.end:
        assert row.chosen_ids[-1] == hf_loading.end_of_completion(tokenizer, template)


@pytest.mark.parametrize("name", SUPPORTED)
def test_model(name: str, folders: dict[str, Path]) -> None:
    """Logits, generation and its end, as transformers has them."""
    folder = folders[name]
    model_matrix.set_template(folder, TEMPLATES["ChatML"])
    spec = models.find(str(folder))
    with closing(open_transformers(folder, spec.template, None, 512, device="cpu")) as backend:
        request = LikelihoodRequest(PROMPT, COMPLETION, end_of_text=True)
        given, scored = backend._request_tokens(request)
        bare = AutoModelForCausalLM.from_config(hf_loading.load_config(folder)).eval()
        load_model(bare, folder / "model.safetensors", strict=False)
        np.testing.assert_allclose(backend.logits(request, "base"), logits_of(bare, given, scored), atol=1e-4)
        _pieces, reason = read(backend.stream(PROMPT, Sampling(max_new_tokens=3, temperature=0.0), "base"))
        assert reason in ("limit", "end_of_text")
        assert backend._end == backend._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert backend._end in backend._ends


def logits_of(model: Any, given: list[int], scored: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([[*given, *scored]])).logits[0, len(given) - 1 : -1].numpy()


@pytest.mark.parametrize("name", SUPPORTED)
def test_training(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Two steps on every linear layer, with the ending KL, an evaluation and a probe."""
    folder = folders[name]
    model_matrix.set_template(folder, TEMPLATES["ChatML"])
    template, tokenizer = models.find(str(folder)).template, hf_loading.load_tokenizer(folder)
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "warmup_share": 0.0, "ending_weight": 0.1, "eval_every": 1}
    config = TrainConfig(model=str(folder), datasets=("d",), target_modules=("all-linear",), **settings)
    pairs = [PreferencePair(PROMPT, COMPLETION, "They are."), PreferencePair("Who?", "Anyone.", "Men, as a rule.")]
    rows = tokenize_run(pairs, pairs[:1], tokenizer, template, config)
    assert rows.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    writer = StatusWriter(JobFolder(tmp_path / "run"), rank=1)  # which writes nothing
    writer.folder.path.mkdir()
    trainer = build_trainer(
        config, writer.folder, load_policy(folder, config, use_cpu=True), tokenizer, rows, writer, use_cpu=True
    )
    trainer.args.save_strategy = "no"
    trainer.train()
    assert any(tensor.abs().max() > 0 for key, tensor in adapter_tensors(trainer.model).items() if "lora_B" in key)
    assert isinstance(ProbeCallback(trainer, writer, tokenizer, template, [], 1).complete(PROMPT), str)


# Adapters


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", ADAPTERS)
def test_adapter(shape: str, tied: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    """Logits of the tuned side as PEFT has them, in transformers and in llama.cpp; or refused in one line."""
    settings, refused = ADAPTERS[shape]
    folder = folders[KINDS[0].name]
    if not tied:
        folder = model_matrix.save(replace(KINDS[0], settings={"tie_word_embeddings": False}), tmp_path / "untied")
    model_matrix.set_template(folder, TEMPLATES["ChatML"])
    spec = models.find(str(folder))
    adapter = tiny_models.write_adapter(tmp_path / "adapter", folder, **settings)
    if refused:
        with pytest.raises(AdapterError, match=f"{refused}, and only plain LoRA .* merge it with PEFT's"):
            models.check_fits(AdapterSpec("a", adapter, ""), spec)
        return
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    request = LikelihoodRequest(PROMPT, COMPLETION, end_of_text=True)
    with closing(open_transformers(folder, spec.template, adapter, 512, device="cpu")) as backend:
        given, scored = backend._request_tokens(request)
        expected = logits_of(peft, given, scored)
        np.testing.assert_allclose(backend.logits(request, "tuned"), expected, atol=1e-4)
    gguf, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    write.merged(spec, None, "F32", gguf)
    if shape == "lm_head" and tied:
        with pytest.raises(AdapterError, match="ties to its embeddings; a GGUF can't hold them apart"):
            write.lora(AdapterSpec("a", adapter, ""), gguf, lora)
        return
    write.lora(AdapterSpec("a", adapter, ""), gguf, lora)
    with closing(open_llamacpp(gguf, models.find(str(gguf)).template, lora, 512, threads=1, kv_cache="f32")) as backend:
        assert backend._request_tokens(request) == (given, scored)
        assert kl_by_position(expected, backend.logits(request, "tuned")).max() < 1e-3


# GGUF


@pytest.mark.parametrize("name", SUPPORTED)
def test_export(name: str, folders: dict[str, Path], tmp_path: Path, workspace: Workspace) -> None:
    """A GGUF is proven equal, and every template has the same tokens in llama.cpp and in Ollama's template; or one line says why
    there is none."""
    folder, out = folders[name], tmp_path / "out.gguf"
    model_matrix.set_template(folder, TEMPLATES["ChatML"])
    spec = models.find(str(folder))
    if why := NOT_EXPORTED.get(name):
        with pytest.raises(ModelError, match=why.removeprefix("a tokenizer that is ")):
            write.merged(spec, None, "F32", out)
        return
    write.merged(spec, None, "F32", out)
    proof = prove(out, None, spec, None, workspace, depth="quick", threads=1)
    assert proof.verdict == "equal", proof.sentence()
    check_gguf(BY_NAME[name], folder, out)


@pytest.mark.parametrize(("index", "write_gguf"), [(2, tiny_models.write_llama_gguf), (7, tiny_models.write_qwen2_gguf)])
def test_gguf(index: int, write_gguf: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """GGUFs of kinds that this project does not write: tokens and logits in llama.cpp are transformers'."""
    kind = KINDS[index]
    folder, out = folders[kind.name], write_gguf(folders[kind.name], tmp_path / "their.gguf")
    check_gguf(kind, folder, out)
    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    with closing(open_llamacpp(out, BARE, None, 512, threads=1, kv_cache="f32")) as backend:
        request = LikelihoodRequest(PROMPT, COMPLETION)
        given, scored = backend._request_tokens(request)
        assert kl_by_position(logits_of(bare, given, scored), backend.logits(request, "base")).max() < 1e-3


def check_gguf(kind: Kind, folder: Path, gguf: Path) -> None:
    """Every template has apply_chat_template's tokens in llama.cpp and in Ollama's form of it."""
    tokenizer = hf_loading.load_tokenizer(folder)
    header, model = read_header(gguf), Model(gguf, lambda _share, _what: None)
    for name, source in TEMPLATES.items():
        if kind.eos is None and "eos_token" in str(source):
            continue
        tokenizer.chat_template = source if isinstance(source, str) else source[1]["template"]
        template = verified(chat_template(tokenizer.chat_template, special_tokens(header), named_tokens(header)))
        for system in [""] if name in NO_SYSTEM else ["", "Be kind."]:
            expected = reference(tokenizer, PROMPT, system=system)
            assert model.tokenize(template.render(PROMPT, system), begin=not template.writes_begin) == expected
            text, _specials = export._ollama_template(template, "")
            assert (text == "") == (name in NOT_IN_OLLAMA)
            if text:
                filled = Segment(fill_in(text, system), special=True)
                assert model.tokenize([filled], begin=False) == expected
        encoded = hf_loading.encode_completion(tokenizer, template, PROMPT, COMPLETION)
        assert (
            encode_jointly(partial(model.tokenize, begin=False), template.render(PROMPT), template.completed(COMPLETION))
            == encoded
        )
    model.close()


def fill_in(go_template: str, system: str) -> str:
    """What Ollama makes of a template of ours."""
    found = re.fullmatch(r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", go_template, re.DOTALL)
    text = go_template if found is None else found[1 if system else 2]
    return text.replace("{{ .System }}", system).replace("{{ .Prompt }}", PROMPT).replace('{{ "{{" }}', "{{")


def test_the_page_is_current() -> None:
    page = Path(__file__).parent.parent / "docs" / "supported-models.md"
    assert page.read_text(encoding="utf-8") == model_matrix.document(), "run `python -m tests.model_matrix`"
