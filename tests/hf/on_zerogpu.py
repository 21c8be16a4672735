"""A pair and scores as on a ZeroGPU Space: python -m tests.hf.on_zerogpu MODEL ADAPTER

With the `spaces` package as on ZeroGPU (SPACES_ZERO_GPU), but for CUDA: the process that it forks computes on the CPU. Prints one
JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biasdpo.backends.base import Backend
from biasdpo.compare import _stream_sides
from biasdpo.records import Completion, GenerationPair, LikelihoodRequest, Sampling
from tests import tiny_models

PROMPT = "Why are nurses always women?"
REQUESTS = [LikelihoodRequest(PROMPT, text) for text in (" They are not.", " Nursing is a profession.")]


def answers(backend: Backend) -> dict[str, Any]:
    """What a page asks of a backend."""
    from biasdpo.backends.base import Cancellation

    sampling = Sampling(max_new_tokens=12, temperature=0.8, seed=3)
    pair = GenerationPair(PROMPT, "tiny", "tiny", backend.name, sampling, "", 1.0, None, Completion("base"), Completion("tuned"))
    *_, last = _stream_sides(backend, pair, [sampling, sampling], Cancellation())
    assert last.right is not None
    return {
        "texts": [last.left.text, last.right.text],
        "ends": [last.left.finish_reason, last.right.finish_reason],
        "scores": [asdict(one) for one in backend.loglikelihood(REQUESTS, "tuned", strength=0.5)],
        "tokens": [list(one) for one in backend.score_tokens(REQUESTS[0], "base")],
    }


def lend_the_cpu() -> None:
    """Load the `spaces` package as on ZeroGPU, with the CPU in place of the GPU; once, before torch is used."""
    import torch

    torch.version.cuda = "12.8"  # as if it were the CUDA build
    torch._C._cuda_init = getattr(torch._C, "_cuda_init", lambda: None)
    torch.cuda._is_in_bad_fork = bool  # picklable
    from spaces.zero import torch as lent

    def init(_uuid: str) -> None:  # in the process that has the GPU
        from biasdpo.backends import hf_loading

        choose = hf_loading.choose_device
        hf_loading.choose_device = lambda _name: choose("cpu")

    lent.init = init
    lent.move = lambda callback: None  # noqa: ARG005 (its name)


def main(model: str, adapter: str) -> None:
    lend_the_cpu()
    from spaces.zero import client, decorator

    from biasdpo.backends import zerogpu

    client.startup_report()  # as the page's launch
    backend = zerogpu.open_zerogpu(Path(model), tiny_models.LLAMA_TEMPLATE, Path(adapter), tiny_models.CONTEXT_LENGTH)
    found = answers(backend) | {"decorated": len(decorator.decorated_cache) > 0, "here": len(zerogpu._kept)}
    print(json.dumps(found), flush=True)
    for process in multiprocessing.active_children():  # it waits for more
        process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
