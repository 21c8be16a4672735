"""A text classifier of the Hub as a toxicity scorer, by transformers, on the CPU."""

from __future__ import annotations

import gc
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch.nn import Linear
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from biasdpo.backends.base import (
    CANARY_COMPLETION,
    CANARY_PROMPT,
    Cancellation,
    ShownText,
    Turnstile,
    check_prompt_fits,
    check_scorable,
    missing_side,
    prove,
)
from biasdpo.backends.hf_loading import (
    Bits,
    Placement,
    begin_ids,
    encode_completion,
    encode_continuation,
    encode_prompt,
    encode_text,
    foreign_errors,
    load_model,
    load_tokenizer,
    undispatched,
)
from biasdpo.backends.prefixes import Row, TokenPath, lay_out, sort_paths, split_into_rows, trunk_length
from biasdpo.benchmarks.toxicity import ToxicityScorer, name_of_classifier
from biasdpo.chat import PromptTemplate
from biasdpo.errors import AdapterError, BackendError, ConfigError
from biasdpo.records import (
    ContinuationRequest,
    FinishReason,
    Likelihood,
    LikelihoodRequest,
    Proof,
    Request,
    Sampling,
    Side,
    TextRequest,
    check_strength,
)
from biasdpo.workspace import read_json

# --- hf sampling: Logits -> the next token, by transformers' own processors


class Draw:
    """Draws one token after another, in the order that `records.Sampling` states.

    On the CPU, whatever the device of the model, so that a seed means the same everywhere.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._tokens = list(prompt)
        self._greedy = sampling.temperature == 0.0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, logits: Any) -> int:
        """The next token after logits (V,)."""
        if not bool(torch.isfinite(logits).all()):
            raise BackendError("The model gave logits that are not numbers: lower the strength, or choose another adapter")
        scores = self._processors(torch.tensor([self._tokens]), logits[None])
        chosen = scores.argmax(-1) if self._greedy else torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        token = int(chosen.item())
        self._tokens.append(token)
        return token


# --- hf batch: Completions of one prompt, computed together: a row each of one batch, over one KV cache


PREFILL_TOKENS = 256  # a prompt is computed in chunks of this many, which bounds the memory it takes
MEETING_SECONDS = 0.2  # how long a stream waits for the other side of its pair; two threads started together need a few ms

# (tokens of each row, cache, rows) -> logits (rows, V) after each row's last token, float32 on the CPU
Step = Callable[[Sequence[list[int]], Any, Sequence["BatchRow"]], Any]


class CancelledError(Exception):
    """The cancellation was set."""


class BatchRow:
    """One completion under way.

    strength   of the adapter: 0 for the base side
    limit      tokens to draw at most
    """

    def __init__(self, side: Side, strength: float, draw: Draw, limit: int, cancellation: Cancellation) -> None:
        self.side = side
        self.strength = strength
        self.cancellation = cancellation
        self.limit = limit
        self.fetchable: deque[int] = deque()  # drawn, and not fetched by the reader yet
        self.over = False  # nothing more is computed for it
        self.failure = ""  # why its reader gets no more tokens
        self.last = -1  # the token drawn last
        self._draw = draw

    def take(self, logits: Any, ends: frozenset[int]) -> None:
        """Draw the next token from logits (V,)."""
        try:
            self.last = self._draw(logits)
        except BackendError as exc:  # logits that are no numbers: the other row is none the worse
            self.failure, self.over = str(exc), True
            return
        self.fetchable.append(self.last)
        self.limit -= 1
        self.over = self.over or self.limit == 0 or self.last in ends


class Batch:
    """The rows of one prompt. `next_token` may be called from a thread a row."""

    def __init__(self, prompt: Sequence[int], rows: Sequence[BatchRow], step: Step, ends: frozenset[int]) -> None:
        self._prompt: list[int] = list(prompt)  # empty once computed
        self._rows = list(rows)  # as they lie in the cache
        self._step = step
        self._ends = ends
        self._cache: Any = DynamicCache()
        self._changed = threading.Condition()
        self._computing = False  # by one thread at a time

    def next_token(self, row: BatchRow) -> int:
        """The next token of a row: fetched where the other reader has computed it, else computed for both.

        Raises CancelledError, or BackendError where a step failed.
        """
        while True:
            if row.cancellation.is_set():
                raise CancelledError
            with self._changed:
                if row.fetchable:
                    return row.fetchable.popleft()
                if row.failure:
                    raise BackendError(row.failure)
                if self._computing:
                    self._changed.wait()
                    continue
                self._computing = True
            try:
                self._advance()
            except CancelledError:  # inside a step: of all of its rows
                self._end("")
            except BaseException as exc:
                self._end(str(exc) or type(exc).__name__)
                raise
            finally:
                with self._changed:
                    self._computing = False
                    self._changed.notify_all()

    def leave(self, row: BatchRow) -> None:
        """The reader of this row wants no more."""
        with self._changed:
            row.over = True
            if not self._computing and all(other.over for other in self._rows):
                self._cache = None

    def _advance(self) -> None:
        """One token for every row that is left."""
        if self._prompt:
            for begin in range(0, len(self._prompt), PREFILL_TOKENS):
                if not self._keep_those_left():
                    return
                chunk = self._prompt[begin : begin + PREFILL_TOKENS]
                logits = self._step([chunk] * len(self._rows), self._cache, self._rows)
            self._prompt = []
        else:
            if not self._keep_those_left():
                return
            logits = self._step([[row.last] for row in self._rows], self._cache, self._rows)
        for row, row_logits in zip(self._rows, logits, strict=True):
            row.take(row_logits, self._ends)

    def _keep_those_left(self) -> bool:
        """Take the rows out of the cache that nothing more is computed for; whether any is left."""
        left = [i for i, row in enumerate(self._rows) if not row.over and not row.cancellation.is_set()]
        if len(left) < len(self._rows):
            self._rows = [self._rows[i] for i in left]
            if left:
                self._cache.batch_select_indices(torch.tensor(left))
            else:
                self._cache = None
        return bool(left)

    def _end(self, failure: str) -> None:
        """Nothing more comes: a step that broke off leaves a cache that is of no use."""
        for row in self._rows:
            row.over, row.failure = True, failure
        self._rows, self._cache = [], None


class _Seat:
    def __init__(self, prompt: list[int], row: BatchRow) -> None:
        self.prompt = prompt
        self.row = row
        self.batch: Batch | None = None


class Meeting:
    """Where the two sides of a pair find each other: whoever comes first waits a short while for the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._seats: list[_Seat] = []

    def batch_of(self, prompt: list[int], row: BatchRow, begin: Callable[[list[BatchRow]], Batch]) -> Batch:
        """The batch that a row is computed in: with the other side's row of the same prompt, base first; alone where none
        comes in time. `begin` makes a batch of rows."""
        with self._changed:
            for seat in self._seats:
                if seat.prompt == prompt and seat.row.side != row.side:
                    self._seats.remove(seat)
                    seat.batch = begin([row, seat.row] if row.side == "base" else [seat.row, row])
                    self._changed.notify_all()
                    return seat.batch
            mine = _Seat(prompt, row)
            self._seats.append(mine)
            self._changed.wait_for(lambda: mine.batch is not None, MEETING_SECONDS)
            if mine.batch is None:
                self._seats.remove(mine)
                mine.batch = begin([row])
            return mine.batch


# --- hf adapter: A PEFT LoRA adapter on a transformers model: checked against the base before it is loaded, swit


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


# --- hf model: The model of a transformers backend, one computation at a time: whoever computes says how much


_Result = TypeVar("_Result")


class _Watch:
    """A hook on every decoder layer, so that a cancel is seen within one layer, however long the prompt's chunk takes."""

    cancellations: Sequence[Cancellation] = ()  # of all that wait for this step

    def __call__(self, _layer: Any, _args: Any) -> None:
        if self.cancellations and all(cancellation.is_set() for cancellation in self.cancellations):
            raise CancelledError


class SharedModel:
    """One copy of the weights, and at most one adapter, for all threads.

    The adapter's switch and scale are global to the model: they are set under the lock, for one computation, and taken back
    before the lock is released. (PEFT's `disable_adapter()` beside a concurrent call gives wrong output.)
    """

    def __init__(self, folder: Path, placement: Placement, bits: Bits | None, report: Callable[[float, str], None]) -> None:
        self._lock = threading.Lock()  # around every computation
        self._watch = _Watch()
        self._adapter: Adapter | None = None
        self.model: Any  # None once closed
        self.model, self.placement = load_model(folder, placement, bits, report)
        self.device = self.placement.device
        for layer in self.model.model.layers:
            layer.register_forward_pre_hook(self._watch)

    def add_adapter(self, folder: Path, *, mix_rows: bool) -> None:
        """Load a PEFT adapter; AdapterError where it does not fit. mix_rows: a batch's rows may differ in strength."""
        with self._lock, undispatched(self.model, self.placement):
            self._adapter = load_adapter(self.model, folder)
            if mix_rows:
                self._adapter.mix_rows()

    def forward(
        self,
        tokens: Sequence[list[int]],
        cache: Any,
        strengths: Sequence[float],
        cancellations: Sequence[Cancellation] = (),
        positions: int = 1,
    ) -> Any:
        """Logits (rows, positions, V), float32 on the CPU, at the last positions of `tokens` (rows, T), which join the cache.

        strengths   of the adapter, one a row: 0 for base
        Raises CancelledError where all the cancellations are set.
        """
        ids = torch.tensor(tokens, device=self.device)
        with self._computing(strengths, cancellations) as model:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=positions).logits
            return logits.float().cpu()

    def compute(self, strength: float, computation: Callable[[Any, torch.device], _Result]) -> _Result:
        """What `computation` makes of the model and its device, the adapter at `strength` for all rows."""
        with self._computing([strength]) as model:
            return computation(model, self.device)

    def close(self) -> None:
        """Free the weights, once the computation under way is done."""
        with self._lock:
            self.model = self._adapter = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _computing(self, strengths: Sequence[float], cancellations: Sequence[Cancellation] = ()) -> Iterator[Any]:
        """The model, for this thread alone, its adapter at these strengths (see `Adapter.active`). Nothing of that is left when
        the block ends."""
        with self._lock, foreign_errors(), torch.inference_mode():
            if self.model is None:
                raise missing_side("base", closed=True)
            self._watch.cancellations = cancellations
            try:
                if self._adapter is None:
                    yield self.model
                else:
                    with self._adapter.active(strengths):
                        yield self.model
            finally:
                self._watch.cancellations = ()


# --- hf scoring: The likelihoods of the transformers backend: rows of tokens that share their beginnings, and th


# Models whose attention takes any mask and any positions, and whose layers mix tokens in no other way: the answers that the
# tests compare with those of one text after another. Of other models every text is a row.
_SHARING = ("LlamaForCausalLM", "PhiForCausalLM")

_LEAST_TRUNK = 16  # tokens; a shorter beginning is not worth a computation of its own
_LOGIT_ROWS = 256  # positions whose logits over the whole vocabulary are held at a time


class Trunk:
    """Keys and values of what all rows begin with, for a model to take as its cache. Nothing is added to it."""

    def __init__(self, cache: Any) -> None:
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self.tokens: int = cache.get_seq_length()

    def update(self, keys: Any, values: Any, layer: int, *_: Any) -> tuple[Any, Any]:
        """What a layer attends to: the trunk's keys and values, then those of the rows, (rows, heads, trunk + W, d)."""
        first_keys, first_values = (tensor.expand(len(keys), -1, -1, -1) for tensor in self._layers[layer])
        return torch.cat((first_keys, keys), dim=2), torch.cat((first_values, values), dim=2)


def shares_beginnings(model: Any) -> bool:
    """Whether the texts of one row may share their beginnings in this model."""
    return type(model).__name__ in _SHARING and model.config._attn_implementation == "sdpa"


def plan_rows(paths: Sequence[TokenPath], *, sharing: bool) -> tuple[int, list[Row]]:
    """(tokens that all sorted paths begin with and that are computed ahead, rows with what comes after these)."""
    if not sharing:
        return 0, [lay_out([path], 0) for path in paths]
    trunk = trunk_length(paths, _LEAST_TRUNK)
    return trunk, [lay_out(part, trunk) for part in split_into_rows(paths, trunk)]


def batches(rows: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows in batches of like length, each of at most `tokens` padded tokens (one row at least), longest first."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def compute_trunk(model: Any, device: torch.device, tokens: Sequence[int]) -> Trunk:
    """The beginning of all rows."""
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([tokens], device=device), past_key_values=cache, use_cache=True)
    return Trunk(cache)


def score_rows(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> list[tuple[int, float]]:
    """For each path of the rows: its index, and the log-probability of its scored tokens, summed, nats."""
    hidden = _hidden(model, device, rows, trunk)
    width = hidden.shape[1]
    # A node that predicts tokens of several paths is projected to the vocabulary once.
    wanted = [
        (place * width + node, token, path.index)
        for place, row in enumerate(rows)
        for path, nodes in zip(row.paths, row.nodes, strict=True)
        for node, token in zip(nodes, path.scored, strict=True)
    ]
    nodes, sources = np.unique(np.array([node for node, _, _ in wanted]), return_inverse=True)
    logps = _logps(model, hidden.flatten(0, 1), nodes, sources, [token for _, token, _ in wanted])
    totals: dict[int, float] = {}
    for (_, _, index), logp in zip(wanted, logps, strict=True):
        totals[index] = totals.get(index, 0.0) + logp
    return list(totals.items())


def logits_of(model: Any, device: torch.device, given: Sequence[int], scored: Sequence[int]) -> NDArray[np.float32]:
    """Logits (T, V) that predict the T scored tokens of one text, computed as a bare model computes them."""
    ids = torch.tensor([[*given, *scored[:-1]]], device=device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits: NDArray[np.float32] = model.get_output_embeddings()(hidden[0, len(given) - 1 :]).float().cpu().numpy()
    return logits


def _hidden(model: Any, device: torch.device, rows: Sequence[Row], trunk: Trunk | None) -> Any:
    """Last hidden states (rows, W, H), padded on the right."""
    width = max(len(row.tokens) for row in rows)
    ids = _padded((row.tokens for row in rows), width, device)
    if trunk is None and all(len(row.paths) == 1 for row in rows):
        # No mask is needed: in a causal model no position sees what comes after it, such as padding.
        return model.model(input_ids=ids, use_cache=False).last_hidden_state
    places = torch.arange(width, device=device)
    ends = torch.maximum(_padded((row.ends for row in rows), width, device), places + 1)  # padding sees itself
    mask = (places <= places[:, None]) & (places[:, None] < ends[:, None, :])
    if trunk is not None:
        mask = torch.cat((mask.new_ones((len(rows), width, trunk.tokens)), mask), dim=-1)
    positions = _padded((row.positions for row in rows), width, device)
    return model.model(
        input_ids=ids, attention_mask=mask[:, None], position_ids=positions, past_key_values=trunk, use_cache=False
    ).last_hidden_state


def _padded(rows: Iterable[list[int]], width: int, device: torch.device) -> Any:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _logps(model: Any, hidden: Any, nodes: NDArray[np.intp], sources: NDArray[np.intp], tokens: Sequence[int]) -> list[float]:
    """Log-probability, nats, of tokens (N), each predicted from nodes[sources[i]] of hidden states (T, H)."""
    head = model.get_output_embeddings()
    logps = np.empty(len(tokens))
    targets = np.asarray(tokens)
    for begin in range(0, len(nodes), _LOGIT_ROWS):
        logits = head(hidden[torch.from_numpy(nodes[begin : begin + _LOGIT_ROWS]).to(hidden.device)]).float()
        here = np.flatnonzero((sources >= begin) & (sources < begin + _LOGIT_ROWS))
        of_logits = torch.from_numpy(sources[here] - begin).to(hidden.device)
        chosen = logits[of_logits, torch.from_numpy(targets[here]).to(hidden.device)]
        logps[here] = (chosen - logits.logsumexp(-1)[of_logits]).double().cpu().numpy()
    return [float(logp) for logp in logps]


# --- hf text: Tokens of a completion, one by one, to the text that may be shown so far


class CompletionText:
    """Holds back what is not certain yet: half a character, the completion prefix, what may become a stop string.

    `decode` turns tokens into text. It is given windows: from the last token that ended a character to the newest.
    """

    def __init__(self, decode: Callable[[list[int]], str], template: PromptTemplate) -> None:
        self._decode = decode
        self._shown = ShownText(template)
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text was taken

    def add(self, token: int | None, *, final: bool) -> tuple[str, bool]:
        """Take one more token (None: the end-of-text token, which has no text); see `ShownText.add`."""
        return self._shown.add(self._new_text(token, final), final=final)

    def _new_text(self, token: int | None, final: bool) -> str:
        if token is not None:
            self._window.append(token)
        before = self._decode(self._window[: self._known])
        text = self._decode(self._window)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return ""  # the bytes of a character so far
        # The next window begins with the tokens just taken: some tokenizers write a token differently at the beginning.
        self._window, self._known = self._window[self._known :], len(self._window) - self._known
        return text[len(before) :]


# --- hf: transformers: one model, one copy of the weights; the adapter is on only while a tuned step is


try:
    import torch
    from transformers import DynamicCache

    pass
    from biasdpo.backends.hf_loading import Bits, choose_placement, end_tokens, foreign_errors, nothing_kept

    pass
    pass
    pass
except ImportError as exc:
    raise BackendError(f"The transformers backend needs {exc.name}: `pip install -r requirements.txt`") from exc

# Padded tokens in one batch of loglikelihood. A CPU is fastest where a batch's activations stay in its caches: SmolLM2 takes 6 ms
# a token at 64 and at 512 tokens, 5 at 256, 8 at 1024 (one core).
_BATCH_TOKENS = {"cpu": 384, "gpu": 32768}

_CANARY = LikelihoodRequest(CANARY_PROMPT, CANARY_COMPLETION)


def open_transformers(
    folder: Path,
    template: PromptTemplate,
    adapter_folder: Path | None,
    context_length: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    batch_sides: bool | None = None,
    bits: Bits | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> TransformersBackend:
    """Load a Hugging Face folder and, where given, a PEFT adapter; prove the two sides (ProofError) and return the engine.

    device        "auto" (the GPU with most free memory, else the CPU), "cpu", "cuda", "cuda:1". Weights are bfloat16 on a GPU
                  that knows it (else float16), float32 on a CPU. A GPU with too little room gets fewer layers, or none
    threads       of the CPU, set for all of torch in this process; default: torch's own choice
    batch_sides   compute both sides of a pair in one batch; default: on a GPU
    bits          quantize the weights by bitsandbytes (a GPU only)
    """
    report = on_progress or (lambda _share, _what: None)
    with nothing_kept(), foreign_errors():
        backend = TransformersBackend(folder, template, context_length, device, threads, batch_sides, bits, report)
        try:
            report(0.7, "proving the comparison")
            bare = [backend.canary_logits("base")]
            if adapter_folder is not None:
                if backend.batches_sides:
                    bare.append(backend.canary_logits_in_one_batch()[0])
                backend.add_adapter(adapter_folder)
            backend.proof = backend.prove(bare)
        except BaseException:
            backend.close()
            raise
    report(1.0, "ready")
    return backend


class TransformersBackend:
    """See `backends.base.Backend`. Made by `open_transformers`."""

    proof: Proof

    def __init__(
        self,
        folder: Path,
        template: PromptTemplate,
        context_length: int,
        device: str,
        threads: int | None,
        batch_sides: bool | None,
        bits: Bits | None,
        report: Callable[[float, str], None],
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = "transformers" if bits is None else f"transformers-{bits}bit"
        self.template = template
        self.turnstile = Turnstile()
        self.has_adapter = False
        self._tokenizer_lock = threading.Lock()  # `tokenizers` forbids two threads in one tokenizer where a flag is set
        self._meeting = Meeting()
        report(0.0, "reading the tokenizer")
        self._tokenizer = load_tokenizer(folder)
        self._shared = SharedModel(folder, choose_placement(folder, device, context_length, bits), bits, report)
        self.device = self._shared.placement.describe()
        # LLM.int8() takes the columns that it leaves in 16 bits from all rows of a batch (bitsandbytes, MatMul8bitLt): the
        # tuned row would change the base row.
        self.batches_sides = bits != 8 and (self._shared.device.type == "cuda" if batch_sides is None else batch_sides)
        self.context_length = min(context_length, int(self._shared.model.config.max_position_embeddings))
        self._ends = end_tokens(self._shared.model, self._tokenizer, template)

    def add_adapter(self, folder: Path) -> None:
        """Load a PEFT adapter; AdapterError where it does not fit the model."""
        self._shared.add_adapter(folder, mix_rows=self.batches_sides)
        self.has_adapter = True

    def prove(self, bare: Sequence[NDArray[np.float32]]) -> Proof:
        """Compare both sides as they will be served with the bare model (see `backends.base.prove`): each alone, and, where
        they are, in one batch. The figures are those of the way that pairs go.

        bare    of the model without its adapter: `canary_logits("base")`; the base row of `canary_logits_in_one_batch()`
        """
        base = self.canary_logits("base")
        tuned = self.canary_logits("tuned") if self.has_adapter else None
        proof = prove(bare[0], base, self.canary_logits("base"), tuned)
        if self.has_adapter and self.batches_sides:
            base, tuned = self.canary_logits_in_one_batch()
            proof = prove(bare[1], base, self.canary_logits_in_one_batch()[0], tuned)
        return proof

    def canary_logits(self, side: Side, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) of one side on the canary's completion."""
        return self.logits(_CANARY, side, strength=strength)

    def canary_logits_in_one_batch(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (T, V) of the base row and of the tuned row on the canary's completion, through a KV cache, as a pair's."""
        given, scored = self._request_tokens(_CANARY)
        strengths, cache = (0.0, 1.0), DynamicCache()
        self._shared.forward([given[:-1]] * 2, cache, strengths)
        base, tuned = self._shared.forward([given[-1:] + scored[:-1]] * 2, cache, strengths, positions=len(scored))
        return base.numpy(), tuned.numpy()

    def close(self) -> None:
        """Free the weights. A stream under way gets a BackendError at its next step."""
        self._shared.close()

    # Streaming

    def stream(
        self,
        prompt: str,
        sampling: Sampling,
        side: Side,
        *,
        system: str = "",
        strength: float = 1.0,
        template: PromptTemplate | None = None,
        cancellation: Cancellation | None = None,
    ) -> Generator[str, None, FinishReason]:
        """See `backends.base.Backend.stream`."""
        cancellation = cancellation or Cancellation()
        template = template or self.template
        self._check(side, strength)
        with self._tokenizer_lock:
            tokens = encode_prompt(self._tokenizer, template, prompt, system)
        check_prompt_fits(tokens, self.context_length)
        with nothing_kept():
            try:
                text = CompletionText(self._decode, template)
                return (yield from self._generate(tokens, text, sampling, side, strength, cancellation))
            except CancelledError:
                return "cancelled"

    def _generate(
        self, tokens: list[int], text: CompletionText, sampling: Sampling, side: Side, strength: float, cancellation: Cancellation
    ) -> Generator[str, None, FinishReason]:
        # The last token drawn need not be stored, so it may be one more than the context holds.
        limit = min(sampling.max_new_tokens, self.context_length - len(tokens) + 1)
        row = BatchRow(side, _strength(side, strength), Draw(sampling, tokens), limit, cancellation)
        if self.has_adapter and self.batches_sides:
            batch = self._meeting.batch_of(tokens, row, lambda rows: Batch(tokens, rows, self._step, self._ends))
        else:
            batch = Batch(tokens, [row], self._step, self._ends)
        try:
            for count in range(1, limit + 1):
                token = batch.next_token(row)
                ended, last = token in self._ends, count == limit
                shown, stopped = text.add(None if ended else token, final=ended or last)
                yield shown
                if ended or stopped:
                    return "end_of_text"
            return "limit"
        finally:
            batch.leave(row)

    def _step(self, tokens: Sequence[list[int]], cache: Any, rows: Sequence[BatchRow]) -> Any:
        """Logits (rows, V) after the tokens of each row; see `hf_batch.Step`."""
        return self._shared.forward(tokens, cache, [row.strength for row in rows], [row.cancellation for row in rows])[:, -1]

    def _decode(self, tokens: list[int]) -> str:
        with self._tokenizer_lock:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    # Likelihood

    def loglikelihood(self, requests: Sequence[Request], side: Side, *, strength: float = 1.0) -> list[Likelihood]:
        """See `backends.base.Backend.loglikelihood`."""
        self._check(side, strength)
        pairs = [self._request_tokens(request) for request in requests]
        if not pairs:
            return []
        strength, paths = _strength(side, strength), sort_paths(pairs)
        logps = [0.0] * len(pairs)
        with nothing_kept():
            sharing = self._shared.compute(strength, lambda model, _device: shares_beginnings(model))
            trunk_tokens, rows = plan_rows(paths, sharing=sharing)
            trunk: Trunk | None = None
            if trunk_tokens:
                beginning = paths[0].tokens[:trunk_tokens]
                trunk = self._shared.compute(strength, lambda model, device: compute_trunk(model, device, beginning))
            roomy = self._shared.device.type == "cuda" and self._shared.placement.whole
            # A GPU that is full has little room for more.
            for batch in batches(rows, _BATCH_TOKENS["gpu" if roomy else "cpu"]):
                found = self._shared.compute(strength, partial(score_rows, rows=batch, trunk=trunk))
                for index, logp in found:
                    logps[index] = logp
        return [Likelihood(logp, len(scored)) for logp, (_, scored) in zip(logps, pairs, strict=True)]

    def logits(self, request: Request, side: Side, *, strength: float = 1.0) -> NDArray[np.float32]:
        """Logits (T, V) that predict each of the request's T scored tokens."""
        self._check(side, strength)
        given, scored = self._request_tokens(request)
        with nothing_kept():
            return self._shared.compute(_strength(side, strength), partial(logits_of, given=given, scored=scored))

    def _request_tokens(self, request: Request) -> tuple[list[int], list[int]]:
        """(given tokens, scored tokens) of a request."""
        with self._tokenizer_lock:
            if isinstance(request, TextRequest):
                tokens = begin_ids(self._tokenizer) + encode_text(self._tokenizer, request.text)
                given, scored = tokens[:1], tokens[1:]
            elif isinstance(request, ContinuationRequest):
                given, scored = encode_continuation(self._tokenizer, request.context, request.continuation)
            else:
                given = encode_prompt(self._tokenizer, self.template, request.prompt, request.system)
                scored = encode_completion(self._tokenizer, self.template, request.continuation, request.end_of_text)
        check_scorable(given, scored, self.context_length)
        return given, scored

    def _check(self, side: Side, strength: float) -> None:
        check_strength(strength)
        closed = self._shared.model is None
        if closed or (side == "tuned" and not self.has_adapter):
            raise missing_side(side, closed=closed)


def _strength(side: Side, strength: float) -> float:
    """Of the adapter: 0 on the base side."""
    return strength if side == "tuned" else 0.0


# --- hf classifier: A text classifier of the Hub as a toxicity scorer, by transformers, on the CPU


_TOXIC_LABELS = ("toxic", "toxicity", "hate", "hateful", "offensive")
_MAX_TOKENS = 512  # of a text; what the usual encoders take


def open_classifier(name: str) -> ToxicityScorer:
    """The scorer that OWNER/NAME, or OWNER/NAME#LABEL, names: a Hub id or a local folder. A text's score is the label's
    probability: by a sigmoid where the classifier knows several labels at once or a single one, else by a softmax.

    Without a LABEL, the one that says toxic, hate or offensive; a ConfigError lists the labels where none or several do.
    """
    hub_id, _, wanted = name.partition("#")
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as exc:
        raise BackendError(f"A classifier of the Hub needs {exc.name}: `pip install -r requirements.txt`") from exc
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(hub_id)
        model: Any = AutoModelForSequenceClassification.from_pretrained(hub_id)
    except Exception as exc:  # the Hub's, safetensors', the tokenizer's: all mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise BackendError(
            f"Can't load the classifier {hub_id}: {reason}; check its name and the network, or use the local profanity_check"
        ) from exc
    model.eval()
    labels = {int(i): str(label) for i, label in model.config.id2label.items()}
    column = _choose_label(labels, wanted, hub_id)
    one_by_one = model.config.problem_type == "multi_label_classification" or len(labels) == 1
    longest = min(_MAX_TOKENS, tokenizer.model_max_length)

    def score(texts: Sequence[str]) -> Sequence[float]:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        probabilities = logits.sigmoid() if one_by_one else logits.softmax(dim=-1)
        found: list[float] = probabilities[:, column].tolist()
        return found

    version = f"{getattr(model.config, '_commit_hash', None) or 'local'} ({labels[column]})"
    return ToxicityScorer(name_of_classifier(hub_id), version, score)


def _choose_label(labels: dict[int, str], wanted: str, hub_id: str) -> int:
    """The index of the label that was named, or that alone says toxic."""
    names = [wanted.casefold()] if wanted else list(_TOXIC_LABELS)
    found = [i for i, label in labels.items() if label.casefold() in names]
    if len(found) != 1:
        listed = ", ".join(labels.values())
        raise ConfigError(f"{hub_id} has the labels {listed}: name the toxic one, as in --toxicity-scorer hub:{hub_id}#LABEL")
    return found[0]
