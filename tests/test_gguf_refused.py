"""Bad models, full disks, killed exports: one line each, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo.errors import ExportError, ModelError
from biasdpo.gguf import write
from biasdpo.gguf.to_hf import write_hf_folder
from tests import tiny_models
from tests.gguf_files import merge, spec_of

ROOT = Path(__file__).resolve().parent.parent


def assert_refused(error: type, message: str, model: Path, out: Path, quantization: str = "F32") -> None:
    with pytest.raises(error, match=message) as refused:
        merge(model, None, quantization, out)
    assert "\n" not in str(refused.value)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


# Folders


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def config(folder: Path, **values) -> None:
    change_json(folder / "config.json", **values)


def tokenizer(folder: Path, change) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))


def weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def norm(folder: Path, change) -> None:
    weights(folder, lambda tensors: tensors.update({NORM: change(tensors[NORM])}))


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


NORM, PRE = "model.final_layernorm.weight", "pre_tokenizer"
INDEX, NESTED = "model.safetensors.index.json", '{"a":' * 100_000
FAULTS = {
    "not a complete safetensors file": lambda f: cut(f / "model.safetensors", 0.9),
    "not a complete safetensors file .*header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
    "is F64, supported are F32, F16, BF16": lambda f: norm(f, lambda values: values.astype(np.float64)),
    r"final_layernorm.weight is \[32\], by config.json \[64\]": lambda f: norm(f, lambda values: values[:32].copy()),
    "lacks model.final_layernorm.weight: fetch": lambda f: weights(f, lambda w: w.pop(NORM)),
    "holds model.extra, which has no place": lambda f: weights(f, lambda w: w.update({"model.extra": np.zeros(3, np.float32)})),
    "is a GPT2LMHeadModel": lambda f: config(f, architectures=["GPT2LMHeadModel"]),
    "rope scaling 'yarn'": lambda f: config(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}, rope_parameters=None),
    "quantized weights": lambda f: config(f, quantization_config={"quant_method": "gptq"}),
    "qk_layernorm": lambda f: config(f, qk_layernorm=True),
    r"config.json is incomplete \(TypeError": lambda f: config(f, hidden_size=None),
    r"config.json is incomplete \(ValueError: num_hidden_layers": lambda f: config(f, num_hidden_layers=2**40),
    r"config.json is incomplete \(AttributeError": lambda f: config(f, quantization_config=3),
    "config.json can't be used: Invalid JSON": lambda f: (f / "config.json").write_text("{"),
    "config.json can't be used: Invalid JSON: recursion": lambda f: (f / "config.json").write_text(NESTED),
    "Can't read .*tokenizer.json: No such file": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer.json can't be used: Input should be an object": lambda f: (f / "tokenizer.json").write_text("[]"),
    r"tokenizer.json is damaged \(KeyError: 'vocab'\)": lambda f: tokenizer(f, lambda t: t["model"].pop("vocab")),
    r"tokenizer.json is damaged \(AttributeError": lambda f: tokenizer(f, lambda t: t.update(added_tokens=[3])),
    r"tokenizer.json is damaged \(ValueError": lambda f: tokenizer(f, lambda t: t.update({PRE: {"type": "Odd"}})),
    "is Unigram, not plain byte-level BPE": lambda f: tokenizer(f, lambda t: t["model"].update(type="Unigram")),
    "BPE with byte_fallback": lambda f: tokenizer(f, lambda t: t["model"].update(byte_fallback=True)),
    r"normalizes text \(NFC\)": lambda f: tokenizer(f, lambda t: t.update(normalizer={"type": "NFC"})),
    "splits text in a way": lambda f: tokenizer(f, lambda t: t.update({PRE: {"type": "Whitespace"}})),
    "splits text in a way without a name": lambda f: tokenizer(f, lambda t: t[PRE].update(use_regex=False)),
    "has no row in the 489 embeddings": lambda f: tokenizer(f, lambda t: t["added_tokens"][1].update(id=600)),
    "strips the text around it": lambda f: tokenizer(f, lambda t: t["added_tokens"][1].update(rstrip=True)),
    "adds tokens to a text": lambda f: tokenizer(
        f, lambda t: t.update(post_processor={"type": "BertProcessing", "sep": ["b", 1], "cls": ["c", 2]})
    ),
}
SHARD_FAULTS = {
    r"lacks 1 of \d+ shards \(model-00002-of-0000..safetensors\)": lambda f: shard(f, 1).unlink(),
    "model-00003-of-0000..safetensors is not a complete": lambda f: cut(shard(f, 2), 0.5),
    "index.json can't be used: its 'weight_map' is wrong": lambda f: (f / INDEX).write_text('{"weight_map": []}'),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return tiny_models.save_tiny_phi(tmp_path_factory.mktemp("sharded") / "model", max_shard_size="100KB")


@pytest.mark.parametrize("message", FAULTS | SHARD_FAULTS)
def test_a_bad_folder_is_refused(tiny_phi, sharded, tmp_path, message):
    folder = shutil.copytree(sharded if message in SHARD_FAULTS else tiny_phi, tmp_path / "model")
    (FAULTS | SHARD_FAULTS)[message](folder)
    assert_refused(ModelError, message, folder, tmp_path / "out" / "a.gguf")


def test_weights_that_do_not_fit_the_type_are_refused(tiny_phi, tmp_path):
    folder, out = shutil.copytree(tiny_phi, tmp_path / "model"), tmp_path / "out" / "a.gguf"
    weights(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 5), 70_000))
    assert_refused(ExportError, r"outside F16's range \(65504\): choose F32 or BF16", folder, out, "F16")
    merge(folder, None, "BF16", out)
    out.unlink()
    weights(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 5), np.nan))
    assert_refused(ModelError, "output.weight holds NaN or infinite weights", folder, out, "F16")


# GGUFs


def write_gguf(path: Path, architecture: str, **values) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    tiny_models._finish(writer)
    return path


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("bert", {}, "architecture 'bert'; adapters can be merged into llama and phi2 only"),
        ("llama", {"general__type": "adapter"}, "no model"),
        ("llama", {"split__count": 3}, "one part of several"),
        ("llama", {}, "lacks llama.block_count"),
        ("llama", {"llama__block_count": 2**31, "llama__attention__head_count": 4}, "lacks llama.block_count"),
        ("llama", {"tokenizer__ggml__model": "gpt2"}, "names no pre-tokenizer"),
    ],
)
def test_a_gguf_of_another_kind_is_refused(tmp_path, architecture, values, message):
    base = write_gguf(tmp_path / "base.gguf", architecture, **values)
    assert_refused(ModelError, message, base, tmp_path / "out" / "a.gguf", "keep")


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.5, 0.999])
def test_a_truncated_gguf_is_refused(tiny_phi_gguf, tmp_path, share):
    base = Path(shutil.copy(tiny_phi_gguf, tmp_path / "base.gguf"))
    cut(base, share)
    assert_refused(ModelError, "truncated|complete GGUF", base, tmp_path / "out" / "a.gguf", "keep")


def test_damaged_metadata_are_one_line_when_converted_for_transformers(tiny_phi_gguf, tmp_path):
    whole, base = tiny_phi_gguf.read_bytes(), tmp_path / "base.gguf"
    for key, other in ((b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"), (b"phi2.context_length", b"phi2.context_lengtz")):
        base.write_bytes(whole.replace(key, other))
        with pytest.raises(ModelError, match=r"base.gguf has damaged metadata|has no phi2.context_length") as refused:
            write_hf_folder(base, tmp_path)
        assert "\n" not in str(refused.value)


# Disks, processes


def test_too_little_room_is_refused_before_anything_is_written(tiny_phi, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    message = r"needs 0.\d\d GB while it runs, 0.00 GB are free"
    assert_refused(ExportError, message, tiny_phi, tmp_path / "out" / "a.gguf")


EXPORT = """
import resource, shutil, sys, time
from pathlib import Path
from biasdpo.errors import BiasDPOError
from biasdpo.gguf import write
from tests.gguf_files import adapter_of, spec_of

model, out, quantization, limit = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**12})  # as if the disk filled up while it runs
if limit > 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def on_progress(share, what):
    if limit < 0:
        print(".", flush=True)
        time.sleep(60)

try:
    if quantization == "lora":
        write.lora(adapter_of(Path(sys.argv[5])), model, out)
    else:
        write.merged(spec_of(model), None, quantization, out, threads=1, on_progress=on_progress)
except BiasDPOError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def command_of(*arguments) -> list[str]:
    return [sys.executable, "-c", EXPORT, *map(str, arguments)]


def export_in_a_process(*arguments) -> str:
    """The last words of an export: model, out, quantization, limit of file sizes in bytes (0: none), adapter."""
    done = subprocess.run(command_of(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("quantization", "limit"),
    [
        ("F32", 3_000),  # in the header
        ("F32", 300_000),  # among the weights
        ("Q8_0", 0),  # in llama.cpp's quantizer: see below
        ("lora", 3_000),
    ],
)
def test_a_file_that_can_not_grow_leaves_nothing(tiny_phi, tiny_phi_gguf, tiny_phi_adapter, tmp_path, quantization, limit):
    model = tiny_phi_gguf if quantization == "lora" else tiny_phi
    if quantization == "Q8_0":  # a base of Q4_0 can be copied, and then grows to 8 bits
        model = tmp_path / "small.gguf"
        merge(tiny_phi, None, "Q4_0", model)
        limit = model.stat().st_size + 5_000
        assert limit < write.expected_sizes(spec_of(model), None, "merged", "gguf")["Q8_0"]
    out = tmp_path / "out" / "a.gguf"
    error = export_in_a_process(model, out, quantization, limit, tiny_phi_adapter)
    assert re.fullmatch(r"ExportError: Can't write .*a.gguf: .*; make room or choose another folder\n", error)
    assert list(out.parent.iterdir()) == []


def test_a_killed_export_leaves_nothing_under_the_name(tiny_phi, tmp_path):
    out = tmp_path / "out" / "a.gguf"
    process = subprocess.Popen(command_of(tiny_phi, out, "F32", -1), cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    left = [path.name for path in out.parent.iterdir()]  # for `export`'s caller to delete, with the working folder
    assert left
    assert all(name.startswith(".a.gguf.") for name in left)
