"""Readers of model files: the quick GGUF reader against the gguf package's, and what each reader says of damaged files."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from biasdpo import models
from biasdpo.errors import ModelError
from biasdpo.model_files import describe, read_header, safetensors_shapes, verified_template
from biasdpo.models import ModelSpec
from tests.gguf_files import metadata_of, tensors_of

DEEP = "[" * 100_000
WRONG_VALUES: list[Any] = [None, True, -1, 1.5, "x", [], [[]], ["x"], {}, {"a": {}}]


def refused(path: Path, match: str = "") -> None:
    with pytest.raises(ModelError, match=match or path.name) as caught:
        verified_template(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["tiny_llama_gguf", "tiny_phi_gguf"])
def test_the_header_is_what_the_gguf_package_reads(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    header = read_header(path)
    assert header.values == metadata_of(path)
    assert [(n, t.shape, t.n_bytes, t.elements) for n, t in header.tensors.items()] == [
        (t.name, tuple(map(int, t.shape[::-1])), t.n_bytes, t.n_elements) for t in tensors_of(path).values()
    ]


def test_quantized_tensors_have_their_size(smollm2: ModelSpec) -> None:
    assert smollm2.gguf_path is not None
    embedding = read_header(smollm2.gguf_path).tensors["token_embd.weight"]
    assert embedding.shape == (49152, 576)
    assert embedding.n_bytes == 49152 * 576 // 32 * 34  # Q8_0: a block of 32 weights takes 32 bytes and a scale of 2


def test_a_safetensors_header_is_what_safetensors_reads(tiny_llama: Path) -> None:
    file = tiny_llama / "model.safetensors"
    assert safetensors_shapes(file) == {name: tensor.shape for name, tensor in load_file(file).items()}


# Damaged files


def damaged_ggufs(whole: bytes) -> Iterator[bytes]:
    for length in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 20), len(whole) - 1]:
        yield whole[:length]
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000  # arrays of arrays
    huge = struct.pack("<I", 9) + struct.pack("<IQ", 4, 2**62)
    alignment = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0)
    yield from (header + nested, header + huge, header + struct.pack("<I", 99), alignment)
    draw = random.Random(0)
    for _ in range(50):
        yield b"GGUF" + struct.pack("<I", 3) + draw.randbytes(200)


def test_a_gguf_damaged_anywhere_is_one_line(tiny_phi_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for content in damaged_ggufs(tiny_phi_gguf.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"cut\.gguf is (not a complete GGUF file|truncated)") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"hello, world", "it begins with b'hell'"),
        (b"GGUF" + (4).to_bytes(4, "little") + bytes(16), "GGUF version 4, supported are 2, 3"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "it is big-endian"),
        (None, r"No model file .*x\.gguf"),
    ],
)
def test_a_foreign_or_newer_gguf_says_so(content: bytes | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    refused(path, line)


def test_a_gguf_with_a_wrong_type_at_any_key_is_one_line(tiny_phi_gguf: Path, tmp_path: Path) -> None:
    """Each key that is read gets a number of 4 bytes instead of its value."""
    whole = tiny_phi_gguf.read_bytes()
    for key in (b"general.architecture", b"tokenizer.ggml.tokens", b"phi2.context_length"):
        at = whole.index(key) + len(key)
        kind = 6  # float32, as long as the uint32 of context_length
        path = tmp_path / "typed.gguf"
        path.write_bytes(whole[:at] + struct.pack("<I", kind) + whole[at + 4 :])
        refused(path, "typed.gguf")


HF_KEYS = {
    "config.json": ["architectures", "max_position_embeddings"],
    "tokenizer_config.json": ["chat_template", "added_tokens_decoder"],
    "tokenizer.json": ["added_tokens"],
    "model.safetensors.index.json": ["weight_map"],
}


@pytest.fixture
def folder(tiny_phi: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_phi, tmp_path / "mine")


@pytest.mark.parametrize("file", HF_KEYS)
@pytest.mark.parametrize("content", ["", "{", "[]", "5", '"x"', DEEP, '{"a":' * 100_000, "\udcff"])
def test_a_damaged_json_file_is_one_line(file: str, content: str, folder: Path) -> None:
    (folder / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, file)


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in HF_KEYS.items() for key in keys])
def test_a_wrong_type_at_any_key_is_one_line_or_does_not_matter(file: str, key: str, folder: Path) -> None:
    path = folder / file
    whole = json.loads(path.read_text()) if path.is_file() else {}
    reasons = []
    for value in WRONG_VALUES:
        path.write_text(json.dumps(whole | {key: value}))
        try:
            describe(folder)
        except ModelError as exc:
            reasons.append(str(exc))
    assert reasons
    assert not any("\n" in reason for reason in reasons)


def test_unknown_keys_of_a_newer_version_do_not_matter(folder: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "99.0", "novelty": {"deep": [1]}}))
    assert describe(folder).architecture == "phi2"


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', DEEP.encode(),
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9999]}}',
    ],
)  # fmt: skip
def test_a_damaged_safetensors_header_is_one_line(header: bytes, folder: Path) -> None:
    for content in (header, len(header).to_bytes(8, "little") + header, b"\xff" * 9):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, r"model\.safetensors is not a complete safetensors file")


def test_missing_files_are_named(folder: Path, tiny_phi_adapter: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    refused(folder, r"lacks 1 of 2 shards \(model-2\.safetensors\)")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, r"has no model\.safetensors")
    refused(tiny_phi_adapter, "is an adapter, not a model")
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()
    refused(folder, "has no config.json, but GGUF files: select one of them")


def test_a_damaged_model_is_one_row_of_the_list(
    tmp_path: Path, tiny_phi_gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(random.Random(0).randbytes(1000))
    (folder / "config.json").write_text("[]")
    cached = tmp_path / "phi-2.Q4_K_M.gguf"
    cached.write_bytes(b"GGUF")
    monkeypatch.setattr(models, "_hub_cached", lambda _id, file: cached if file.endswith(".gguf") else None)
    rows = [*models.list_models(), *models.list_models([str(noise), str(tiny_phi_gguf), str(folder), "gpt9"])]
    assert [row.id for row in rows] == ["smollm2", "phi-2", str(noise), str(tiny_phi_gguf), str(folder), "gpt9"]
    lines = [row.problem for row in rows]
    assert [bool(line) for line in lines] == [False, True, True, False, True, True]
    assert not any("\n" in line or "delete" in line for line in lines)


def test_a_chat_template_among_several_is_the_default_one(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "<u>{{ messages[-1].content }}<a>"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    assert describe(folder).template.render_text("Hi") == "<u>Hi<a>"
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    refused(folder, r"its chat template can't be rendered \(no\)")
