"""Both sides through `compare.stream_pair` against two bare `llama_cpp.Llama` objects run one after the other.

    python -m tests.perf.compare [--repetitions 5] [--tokens 128]

Same prompts, greedy, end-of-text suppressed on both; bare with the faster of 1 and 2 threads; alternating. Prints one JSON
object: tokens per second of both sides together, time until both sides show their first token (against the sum of the two
bare times), each as a ratio of medians; and the time to first token of a prompt asked again.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from biasdpo import models
from biasdpo.backends import llamacpp
from biasdpo.compare import stream_pair
from biasdpo.engines import Engine
from biasdpo.gguf import write
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import GenerationPair, Sampling
from tests.bare import bare_llama
from tests.lora_factory import write_lora
from tests.perf.measuring import options, rounded

PROMPT = "Why do people say that {} are bad at maths, and is it true?"
build_chain = llamacpp.build_chain
END_OF_TEXT = 2  # <|im_end|> of SmolLM2
GROUPS = ("women", "artists", "old people", "teachers", "nurses", "men", "farmers", "students", "drivers", "writers", "cooks")


def build_endless_chain(sampling: Sampling, vocabulary_size: int, context_length: int) -> Any:
    """`llamacpp.build_chain` with the end-of-text token suppressed, as it is on the bare side."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    never = (llama_cpp.llama_logit_bias * 1)(llama_cpp.llama_logit_bias(token=END_OF_TEXT, bias=float("-inf")))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_logit_bias(vocabulary_size, 1, never))
    llama_cpp.llama_sampler_chain_add(chain, build_chain(sampling, vocabulary_size, context_length))
    return chain


def ours(engine: Engine, prompt: str, tokens: int) -> dict[str, float]:
    started = time.perf_counter()
    *_, pair = stream_pair(engine, prompt, Sampling(tokens, temperature=0.0, repetition_penalty=1.0))
    seconds = time.perf_counter() - started
    assert isinstance(pair, GenerationPair)
    assert pair.right is not None
    assert pair.left.tokens == pair.right.tokens == tokens
    first = max(pair.left.seconds_to_first_token or 0.0, pair.right.seconds_to_first_token or 0.0)
    return {"tokens_per_second": 2 * tokens / seconds, "first_token_seconds": first}


def bare(llamas: list[Any], prompt_tokens: list[int], tokens: int) -> dict[str, float]:
    def suppress(_ids: Any, scores: np.ndarray) -> np.ndarray:
        scores[llamas[0].token_eos()] = -np.inf
        return scores

    started = time.perf_counter()
    first = 0.0
    for llama in llamas:
        llama.reset()
        begun = time.perf_counter()
        stream = llama.generate(
            prompt_tokens, temp=0.0, top_k=1, repeat_penalty=1.0, logits_processor=llama_cpp.LogitsProcessorList([suppress])
        )
        for count, _token in enumerate(stream, start=1):
            if count == 1:
                first += time.perf_counter() - begun
            if count == tokens:
                break
    return {"tokens_per_second": 2 * tokens / (time.perf_counter() - started), "first_token_seconds": first}


BARE = ("bare_1_thread", "bare_2_threads")


def race(
    spec: ModelSpec, gguf: Path, lora: Path, context_length: int, tokens: int, repetitions: int
) -> dict[str, list[dict[str, float]]]:
    """Rounds of ours and of both bare ways in turn; also the first token of ours where the prompt is asked again."""
    llamacpp.build_chain = build_endless_chain
    backend: Any = llamacpp.open_llamacpp(gguf, spec.template, lora, context_length)
    engine = Engine(spec, AdapterSpec("lora", lora.parent, ""), backend)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", *BARE, "again")}
    with ExitStack() as stack:
        llamas = {
            name: [stack.enter_context(bare_llama(gguf, file, threads=n, context_length=context_length)) for file in (None, lora)]
            for n, name in enumerate(BARE, start=1)
        }
        for i in range(repetitions + 1):
            prompt = PROMPT.format(GROUPS[i % len(GROUPS)])
            prompt_tokens = backend.tokenize(spec.template.render(prompt))
            measured["ours"].append(ours(engine, prompt, tokens))
            for name in BARE:
                measured[name].append(bare(llamas[name], prompt_tokens, tokens))
            measured["again"].append(ours(engine, prompt, 1))
    backend.close()
    return {name: rounds[1:] for name, rounds in measured.items()}  # the first round warms up


def medians(measured: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    return {name: statistics.median(value[key] for value in measured[name]) for name in ("ours", *BARE)}


def main() -> None:
    args = options(__doc__, repetitions=5, tokens=128)
    spec = models.find("smollm2")
    assert spec.gguf_path is not None
    with tempfile.TemporaryDirectory() as folder:
        shipped = models.ASSETS / "adapters" / "smollm2-biasdpo"
        adapter_folder = shipped if shipped.is_dir() else write_lora(Path(folder) / "random", rank=16)
        adapter = AdapterSpec(adapter_folder.name, adapter_folder, "smollm2")
        lora = write.lora(adapter, spec.gguf_path, Path(folder) / "lora.gguf")
        measured = race(spec, spec.gguf_path, lora, 4096, args.tokens, args.repetitions)
    speeds, firsts = medians(measured, "tokens_per_second"), medians(measured, "first_token_seconds")
    fastest = max(BARE, key=speeds.__getitem__)
    again = statistics.median(value["first_token_seconds"] for value in measured["again"])
    result = {"repetitions": args.repetitions, "tokens_a_side": args.tokens, "adapter": adapter.id, "fastest_bare": fastest}
    result |= {"tokens_per_second": rounded(speeds, 1), "tokens_per_second_ratio": round(speeds["ours"] / speeds[fastest], 3)}
    result |= {"first_token_seconds": rounded(firsts, 4)}
    result |= {"first_token_ratio": round(firsts["ours"] / min(firsts[name] for name in BARE), 3)}
    print(json.dumps(result | {"first_token_seconds_of_a_repeated_prompt": round(again, 4)}))


if __name__ == "__main__":
    main()
