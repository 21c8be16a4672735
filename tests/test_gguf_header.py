"""The quick reader of GGUF headers against the gguf package's, and what it says of files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from biasdpo.errors import ModelError
from biasdpo.model_files import read_header
from biasdpo.models import ModelSpec


@pytest.mark.parametrize("kind", ["tiny_llama_gguf", "tiny_phi_gguf"])
def test_it_reads_what_the_gguf_package_reads(kind: str, request: pytest.FixtureRequest) -> None:
    from gguf import GGUFReader

    path: Path = request.getfixturevalue(kind)
    header, theirs = read_header(path), GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.values == fields
    assert {n: t.shape for n, t in header.tensors.items()} == {t.name: tuple(map(int, t.shape[::-1])) for t in theirs.tensors}
    assert [t.n_bytes for t in header.tensors.values()] == [t.n_bytes for t in theirs.tensors]
    assert [t.elements for t in header.tensors.values()] == [t.n_elements for t in theirs.tensors]


def test_quantized_tensors_have_their_size(smollm2: ModelSpec) -> None:
    assert smollm2.gguf_path is not None
    embedding = read_header(smollm2.gguf_path).tensors["token_embd.weight"]
    assert embedding.shape == (49152, 576)
    assert embedding.n_bytes == 49152 * 576 // 32 * 34  # Q8_0: a block of 32 weights takes 32 bytes and a scale of 2


def test_a_file_cut_anywhere_is_one_line(tiny_phi_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_phi_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 50), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf is (no complete GGUF file|cut off)") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "no complete GGUF"),
        (b"hello, world", "it begins with b'hell'"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "GGUF version 1, known are 2, 3"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64, "no complete GGUF"),
    ],
)
def test_a_foreign_file_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=line):
        read_header(path)
    with pytest.raises(ModelError, match=r"No model file .*none\.gguf"):
        read_header(tmp_path / "none.gguf")
