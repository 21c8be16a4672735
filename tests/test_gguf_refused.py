"""Bad models, bad adapters, full disks, killed exports: one line each, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biasdpo import models
from biasdpo.errors import AdapterError, ExportError, ModelError, RefusedError
from biasdpo.gguf import write
from tests import tiny_models
from tests.test_gguf_merged import adapter_of

ROOT = Path(__file__).resolve().parent.parent


def spec_of(path: Path) -> models.ModelSpec:
    """A model's spec by its path alone, so that the exporter is the first to look into its files."""
    files = {"gguf_path": path} if path.suffix == ".gguf" else {"hf_folder": path}
    return models.ModelSpec(str(path), path.name, "", "", "", 0, 512, tiny_models.PHI_TEMPLATE, **files)


def assert_refused(error: type, message: str, spec, adapter, out: Path, quantization: str = "F32") -> None:
    with pytest.raises(error, match=message) as refused:
        write.merged(spec, adapter, quantization, out)
    assert "\n" not in str(refused.value)
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


# Models


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_tokenizer(folder: Path, change) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def change_norm(folder: Path, change) -> None:
    change_weights(folder, lambda weights: weights.update({NORM: change(weights[NORM])}))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


PRE = "pre_tokenizer"
NORM = "model.final_layernorm.weight"
SHARD_FAULTS = {
    "lacks model-00002-of-0000..safetensors of . files": lambda f: shards(f)[1].unlink(),
    "model-00003-of-0000..safetensors is no complete safetensors": lambda f: cut(shards(f)[2], 0.5),
    "no index of safetensors": lambda f: (f / "model.safetensors.index.json").write_text("{}"),
}
FAULTS = {
    "no complete safetensors file": lambda f: cut(f / "model.safetensors", 0.9),
    "its header should be": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
    "is F64, of F32, F16, BF16 one is needed": lambda f: change_norm(f, lambda norm: norm.astype(np.float64)),
    r"final_layernorm.weight is \[32\], by config.json \[64\]": lambda f: change_norm(f, lambda norm: norm[:32].copy()),
    r"lacks model.final_layernorm.weight: fetch": lambda f: change_weights(f, lambda w: w.pop(NORM)),
    "holds model.extra, for which": lambda f: change_weights(f, lambda w: w.update({"model.extra": np.zeros(3, np.float32)})),
    "is a GPT2LMHeadModel": lambda f: change_config(f, architectures=["GPT2LMHeadModel"]),
    "rope scaling 'yarn'": lambda f: change_config(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}, rope_parameters=None),
    "quantized weights": lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
    "qk_layernorm": lambda f: change_config(f, qk_layernorm=True),
    r"config.json is incomplete \(TypeError": lambda f: change_config(f, hidden_size=None),
    "no readable config.json": lambda f: (f / "config.json").write_text("{"),
    "has no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "is Unigram, no plain byte-level BPE": lambda f: change_tokenizer(f, lambda t: t["model"].update(type="Unigram")),
    "BPE with byte_fallback": lambda f: change_tokenizer(f, lambda t: t["model"].update(byte_fallback=True)),
    r"normalizes text \(NFC\)": lambda f: change_tokenizer(f, lambda t: t.update(normalizer={"type": "NFC"})),
    r"cuts text in a way \(Whitespace\)": lambda f: change_tokenizer(f, lambda t: t.update({PRE: {"type": "Whitespace"}})),
    r"cuts text in a way \(ByteLevel\)": lambda f: change_tokenizer(f, lambda t: t[PRE].update(add_prefix_space=True)),
    "has no row in the 489 embeddings": lambda f: change_tokenizer(f, lambda t: t["added_tokens"][1].update(id=600)),
    "swallows what is around it": lambda f: change_tokenizer(f, lambda t: t["added_tokens"][1].update(rstrip=True)),
    "adds tokens to a text": lambda f: change_tokenizer(f, lambda t: t.update(post_processor={"type": "BertProcessing"})),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_bad_folder_is_refused(tiny_phi, tmp_path, message):
    folder = shutil.copytree(tiny_phi, tmp_path / "model")
    FAULTS[message](folder)
    assert_refused(ModelError, message, spec_of(folder), None, tmp_path / "out" / "a.gguf")


@pytest.mark.parametrize("message", SHARD_FAULTS)
def test_a_bad_shard_is_refused(sharded, tmp_path, message):
    folder = shutil.copytree(sharded, tmp_path / "model")
    SHARD_FAULTS[message](folder)
    assert_refused(ModelError, message, spec_of(folder), None, tmp_path / "out" / "a.gguf")


def test_weights_that_are_no_numbers_are_refused(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "model")
    change_weights(folder, lambda weights: weights["lm_head.weight"].__setitem__((3, 5), np.nan))
    assert_refused(ModelError, "output.weight .* no finite numbers", spec_of(folder), None, tmp_path / "out" / "a.gguf", "F16")


def test_weights_beyond_f16_are_refused_as_f16_alone(tiny_phi, tmp_path):
    folder = shutil.copytree(tiny_phi, tmp_path / "model")
    change_weights(folder, lambda weights: weights["lm_head.weight"].__setitem__((3, 5), 70_000))
    out = tmp_path / "out" / "a.gguf"
    assert_refused(ExportError, r"beyond F16's range \(65504\): choose F32 or BF16", spec_of(folder), None, out, "F16")
    write.merged(spec_of(folder), None, "BF16", out)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tiny_models.save_tiny_phi(tmp_path_factory.mktemp("sharded") / "model", max_shard_size="100KB")
    assert len(shards(folder)) >= 3
    return folder


def write_gguf(path: Path, architecture: str, **values) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("bert", {}, "architecture 'bert', into which nothing can be merged"),
        ("llama", {"general__type": "adapter"}, "no model"),
        ("llama", {"split__count": 3}, "one part of several"),
        ("llama", {}, "lacks llama.block_count"),
        ("llama", {"tokenizer__ggml__model": "gpt2"}, "names no pre-tokenizer"),
    ],
)
def test_a_gguf_of_another_kind_is_refused(tmp_path, architecture, values, message):
    base = write_gguf(tmp_path / "base.gguf", architecture, **values)
    assert_refused(ModelError, message, spec_of(base), None, tmp_path / "out" / "a.gguf", "keep")


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.5, 0.999])
def test_a_cut_off_gguf_is_refused(tiny_phi_gguf, tmp_path, share):
    base = Path(shutil.copy(tiny_phi_gguf, tmp_path / "base.gguf"))
    cut(base, share)
    assert_refused(ModelError, "truncated|not a complete GGUF", spec_of(base), None, tmp_path / "out" / "a.gguf", "keep")


def test_a_llama_gguf_without_a_pre_tokenizer_is_refused(tiny_llama, tmp_path):
    base = tiny_models.write_llama_gguf(tiny_llama, tmp_path / "base.gguf", pre="")
    assert_refused(ModelError, "names no pre-tokenizer", spec_of(base), None, tmp_path / "out" / "a.gguf", "keep")


def test_the_base_is_not_written_over(tiny_phi, tmp_path):
    base = tiny_models.write_phi_gguf(tiny_phi, tmp_path / "base.gguf")
    before = base.read_bytes()
    with pytest.raises(ExportError, match="base model's own file"):
        write.merged(spec_of(base), None, "keep", base)
    assert base.read_bytes() == before


def test_a_folder_is_no_target(tiny_phi, tmp_path):
    with pytest.raises(ExportError, match="is a folder"):
        write.merged(spec_of(tiny_phi), None, "F16", tmp_path)


def test_export_on_request_is_refused_on_a_public_space(tiny_phi, tmp_path, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "someone/space")
    with pytest.raises(RefusedError, match="Export is switched off"):
        write.export_merged(spec_of(tiny_phi), None, "F16", tmp_path / "a.gguf")


# Adapters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
    ],
)
@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_adapters_that_are_more_than_lora_are_refused(tiny_phi, tiny_phi_gguf, tmp_path, settings, message, source):
    adapter = tiny_models.write_adapter(tmp_path / "adapter", tiny_phi, **settings)
    spec = spec_of(tiny_phi if source == "hf" else tiny_phi_gguf)
    assert_refused(AdapterError, message, spec, adapter_of(adapter), tmp_path / "out" / "a.gguf")


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_an_adapter_of_another_model_is_refused(tiny_phi, tiny_phi_gguf, tiny_llama_adapter, tmp_path, source):
    spec = spec_of(tiny_phi if source == "hf" else tiny_phi_gguf)
    other = tiny_models.save_tiny_phi(tmp_path / "other", hidden_size=32)
    narrow = tiny_models.write_adapter(tmp_path / "narrow", other)
    out = tmp_path / "out" / "a.gguf"
    assert_refused(AdapterError, "another base model: it adapts", spec, adapter_of(tiny_llama_adapter), out)
    assert_refused(AdapterError, "layers.0.mlp.fc1 is 128 x 32, this model's 128 x 64", spec, adapter_of(narrow), out)


def test_adapted_embeddings_and_wrong_dtypes_are_refused(tiny_phi, tiny_phi_adapter, tmp_path):
    adapter = shutil.copytree(tiny_phi_adapter, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 489), np.float32)}
    save_file(weights | embedding, adapter / "adapter_model.safetensors")
    assert_refused(AdapterError, "adapts the embeddings", spec_of(tiny_phi), adapter_of(adapter), tmp_path / "out" / "a.gguf")
    save_file({name: tensor.astype(np.int8) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert_refused(AdapterError, "as I8: save", spec_of(tiny_phi), adapter_of(adapter), tmp_path / "out" / "a.gguf")


# Disks, processes


def test_too_little_room_is_told_before_anything_is_written(tiny_phi, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert_refused(
        ExportError, r"needs 0.\d\d GB while it runs, 0.00 GB are free", spec_of(tiny_phi), None, tmp_path / "out" / "a.gguf"
    )


EXPORT = """
import resource, shutil, sys
from pathlib import Path
from biasdpo import gguf_export
from biasdpo.errors import BiasDPOError
from tests.test_gguf_refused import spec_of
shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**12})  # as if the disk filled up while it runs
limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    gguf_export.merged(spec_of(Path(sys.argv[1])), None, sys.argv[3], Path(sys.argv[2]), threads=1)
except BiasDPOError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def export_in_a_process(model: Path, out: Path, quantization: str, limit: int = 0) -> str:
    """The last words of an export that may write files of `limit` bytes at most (0: any)."""
    command = [sys.executable, "-c", EXPORT, str(model), str(out), quantization, str(limit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("quantization", "limit"),
    [
        ("F32", 3_000),  # in the header
        ("F32", 300_000),  # among the weights
        ("Q8_0", 0),  # in llama.cpp's quantizer: see below
    ],
)
def test_a_file_that_can_not_grow_leaves_nothing(tiny_phi, tmp_path, quantization, limit):
    model = tiny_phi
    if quantization == "Q8_0":  # a base of Q4_0 can be copied, and then grows to 8 bits
        model = write.merged(spec_of(tiny_phi), None, "Q4_0", tmp_path / "small.gguf").path
        limit = model.stat().st_size + 5_000
        assert limit < write.expected_bytes(spec_of(model), "Q8_0")
    out = tmp_path / "out" / "a.gguf"
    told = export_in_a_process(model, out, quantization, limit)
    assert re.fullmatch(r"ExportError: Can't write .*a.gguf: .*; make room or choose another folder\n", told)
    assert list(out.parent.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 kB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a disk")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_a_full_disk_leaves_nothing(tiny_phi, small_disk, quantization):
    """F32 takes 490 kB; Q8_0 as much for what it is made of."""
    told = export_in_a_process(tiny_phi, small_disk / "a.gguf", quantization)
    assert re.fullmatch(r"ExportError: Can't write .*a.gguf: No space left on device \(.*\); make room .*\n", told)
    assert list(small_disk.iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_the_next(tiny_phi, tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom biasdpo import gguf_export\n"
        "from tests.test_gguf_refused import spec_of\n"
        "gguf_export.merged(spec_of(Path(sys.argv[1])), None, 'F32', Path(sys.argv[2]),"
        " on_progress=lambda share, what: (print('.', flush=True), time.sleep(60)))\n"
    )
    command = [sys.executable, "-c", script, str(tiny_phi), str(tmp_path / "killed.gguf")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        left = tmp_path / ".killed.gguf.exporting"
        assert (left / "merged.gguf").is_file()
        with pytest.raises(ExportError, match="Another export writes"):
            write.merged(spec_of(tiny_phi), None, "F32", tmp_path / "killed.gguf")
        write.merged(spec_of(tiny_phi), None, "F32", tmp_path / "beside.gguf")
        assert (left / "merged.gguf").is_file()  # the other export is alive: its folder stays
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "killed.gguf").exists()
    write.merged(spec_of(tiny_phi), None, "F16", tmp_path / "other.gguf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["beside.gguf", "other.gguf"]


def test_an_old_file_stays_until_the_new_one_is_whole(tiny_phi, tmp_path):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")

    def look(share: float, _what: str) -> None:
        assert out.read_bytes() == b"old" or share == 1.0

    write.merged(spec_of(tiny_phi), None, "F16", out, on_progress=look)
    assert out.read_bytes()[:4] == b"GGUF"
