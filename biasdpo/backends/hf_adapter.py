"""A PEFT LoRA adapter on a transformers model: checked against the base before it is loaded, switched for each computation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch.nn import Linear

from biasdpo.errors import AdapterError
from biasdpo.workspace import read_json

NAME = "default"
_NO_ADAPTER = "__base__"  # PEFT's name for rows without one
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

# Features of PEFT's LoRA that change the base side or can't be scaled by the strength: never a plain W + s * B @ A.
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Ways to begin that move a part of the base weights into the adapter: it then belongs to a base that nobody has.
_REFUSED_BEGINNINGS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class Adapter:
    """The LoRA layers of one adapter in a model: off, computing what the bare model does, but for the time of `active`."""

    def __init__(self, model: Any) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._scales = [float(layer.scaling[NAME]) for layer in self._layers]
        self._rows = _Rows()
        self._switch(False)

    def mix_rows(self) -> None:
        """From now on `active` takes rows at different strengths."""
        # PEFT's own way, `adapter_names` given to the model, puts a hook on every layer for each forward pass, and leaves
        # them there when that raises (out of memory, cancelled). These stay for good, and say nothing but in `active`.
        for layer in self._layers:
            layer.register_forward_pre_hook(self._rows, with_kwargs=True)

    @contextmanager
    def active(self, strengths: Sequence[float]) -> Iterator[None]:
        """Within the block row i of a batch computes W + strengths[i] * scale * B @ A, and W alone where that is 0.

        strengths   one for all rows; or (after `mix_rows`) one a row, each 0 or one and the same other
        """
        used = {strength for strength in strengths if strength != 0.0}
        if not used:
            yield
            return
        (strength,) = used  # the scale belongs to the layer, not to the row
        for layer, scale in zip(self._layers, self._scales, strict=True):
            layer.scaling[NAME] = scale * strength
        try:
            if 0.0 in strengths:
                self._rows.adapter_names = [NAME if row else _NO_ADAPTER for row in strengths]
            self._switch(True)
            yield
        finally:
            self._switch(False)
            self._rows.adapter_names = None

    def _switch(self, on: bool) -> None:
        # What PEFT's enable_adapters() does, less its walk over every parameter's requires_grad: that would cost
        # milliseconds a token, twice.
        for layer in self._layers:
            layer._disable_adapters = not on


class _Rows:
    """A hook that tells a LoRA layer which rows of the batch are whose, while that is known."""

    adapter_names: list[str] | None = None

    def __call__(self, _layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.adapter_names is None:
            return None
        return args, {**kwargs, "adapter_names": self.adapter_names}


def load_adapter(model: Any, folder: Path) -> Adapter:
    """Put the LoRA adapter in `folder` into `model`, whose LoRA layers are off afterwards.

    Raises AdapterError where the adapter is damaged, unsafe, no plain LoRA, or made for another base model.
    """
    adapted = check_adapter(model, folder)
    device = next(model.parameters()).device
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 for a property by its old name: nothing that a user can mend.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # an AdapterError, below
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=NAME, torch_device=str(device))
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise AdapterError(f"PEFT can't load the adapter {folder}: {reason[:300]}; train or fetch it again") from exc
    peft_model.eval()
    layers = {name.removeprefix("base_model.model.") for name, m in peft_model.named_modules() if isinstance(m, LoraLayer)}
    if layers != adapted:
        raise AdapterError(
            f"{folder} is incomplete: its settings adapt {len(layers)} layers, its file holds {len(adapted)}; train or fetch "
            "it again"
        )
    return Adapter(peft_model)


def check_adapter(model: Any, folder: Path) -> set[str]:
    """The names of the modules that the adapter in `folder` adapts, all of which fit `model`; else AdapterError."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for file in (weights, settings):
        if not file.is_file():
            raise AdapterError(f"{folder} has no {file.name}: name a folder that PEFT's save_pretrained wrote, as safetensors")
    config = read_json(settings)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a {config.get('peft_type')!r} adapter: only LORA adapters can be used")
    used = [name for name in _REFUSED if config.get(name)]
    if str(config.get("init_lora_weights")).startswith(_REFUSED_BEGINNINGS):
        used.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if used:
        raise AdapterError(f"{folder} uses {', '.join(used)}: only plain LoRA can be switched off exactly; train without")

    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                match = _FACTOR.fullmatch(name)
                if match is None:
                    raise AdapterError(f"{weights} holds {name}, which is no LoRA factor: only plain LoRA adapters can be used")
                factors.setdefault(match["module"], {})[match["factor"]] = tuple(file.get_slice(name).get_shape())
    except (OSError, SafetensorError) as exc:
        raise AdapterError(f"{weights} is no complete safetensors file ({exc}): train or fetch the adapter again") from exc
    if not factors:
        raise AdapterError(f"{weights} holds no LoRA factors: name an adapter that was trained")

    modules = dict(model.named_modules())
    for module, shapes in sorted(factors.items()):
        base = modules.get(module)
        if not isinstance(base, Linear):
            raise AdapterError(f"{folder} was made for another base model: it adapts {module}, which this model lacks")
        a, b = shapes.get("A", ()), shapes.get("B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(f"{weights}: {module} has no matching pair of LoRA factors; train or fetch the adapter again")
        if (b[0], a[1]) != (base.out_features, base.in_features):  # not its weight's shape: 4-bit weights are packed
            raise AdapterError(
                f"{folder} was made for another base model: its {module} is {b[0]} x {a[1]}, this model's "
                f"{base.out_features} x {base.in_features}"
            )
    return set(factors)
