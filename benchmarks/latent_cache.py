"""Steps of decoding with the latent cache against the ordinary one, and the bytes of both caches, in one run.

One token after ``--context`` others, at batch ``--batch``: the cache is cut back after every step, so that all steps
are alike. Models take turns, the first of a turn changing with every repeat; times are medians with quartiles, and
only their ratio means anything elsewhere. ``values`` keeps the values alone as latents; ``fused`` have the first
factors of q, k and v as one product. ``--quantised`` adds the ordinary cache in few bits (``QuantizedCache`` of
transformers), as backend or backend-bits: ``fp8`` needs no other package, ``quanto`` needs optimum-quanto, ``hqq`` hqq.
It cannot be cut back, so it grows by a token each step.

    python benchmarks/latent_cache.py CHECKPOINT --context 4096 --repeats 40 --quantised fp8,quanto-4
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from svdllm import fuse_factors, load_model
from svdllm.inference.latent_cache import cache_bytes, cache_size, use_latent_cache


class Contender:
    """A model with its cache of the context; ``seconds`` of every step so far."""

    def __init__(
        self,
        args: argparse.Namespace,
        latent: bool = False,
        keys: bool = True,
        fused: bool = False,
        quantised: str | None = None,
    ):
        self.model: Any = load_model(args.checkpoint).to(args.device, args.dtype).eval()
        if fused:
            fuse_factors(self.model)
        self.layers = use_latent_cache(self.model, keys=keys) if latent else 0
        self.can_crop = quantised is None
        self.cache = DynamicCache(config=self.model.config) if quantised is None else self._quantised(quantised)
        self.seconds: list[float] = []

    def prefill(self, ids: Tensor) -> float:
        return self._timed(ids)

    def step(self, token: Tensor) -> None:
        self.seconds.append(self._timed(token))
        if self.can_crop:
            self.cache.crop(-1)

    def _quantised(self, name: str) -> QuantizedCache:
        backend, _, bits = name.partition("-")
        return QuantizedCache(backend, self.model.config, **({"nbits": int(bits)} if bits else {}))

    def _timed(self, ids: Tensor) -> float:
        synchronise(ids.device)
        start = time.perf_counter()
        self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        synchronise(ids.device)
        return time.perf_counter() - start


def stored_bytes(cache: Any) -> int:
    """Bytes of a cache, with what a quantised one keeps beside the last tokens."""
    quantised = [
        (getattr(each, "_quantized_keys", None), getattr(each, "_quantized_values", None)) for each in cache.layers
    ]
    return cache_bytes(cache) + sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(quantised))


def tensors_in(what: Any) -> Iterator[Tensor]:
    """The plain tensors in tuples, lists, dictionaries and tensors that are made of others."""
    if hasattr(what, "__tensor_flatten__"):
        yield from tensors_in([getattr(what, name) for name in what.__tensor_flatten__()[0]])
    elif isinstance(what, Tensor):
        yield what
    elif isinstance(what, Mapping):
        yield from tensors_in(list(what.values()))
    elif isinstance(what, list | tuple):
        for part in what:
            yield from tensors_in(part)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    contenders = {
        "ordinary": Contender(args),
        "latent": Contender(args, latent=True),
        "values": Contender(args, latent=True, keys=False),
        "ordinary fused": Contender(args, fused=True),
        "latent fused": Contender(args, latent=True, fused=True),
        **{name: Contender(args, quantised=name) for name in args.quantised},
    }
    config = contenders["ordinary"].model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (args.batch, args.context + 1), generator=generator).to(args.device)
    prefill = {name: contender.prefill(ids[:, :-1]) for name, contender in contenders.items()}
    cache = {name: stored_bytes(contender.cache) for name, contender in contenders.items()}
    names = list(contenders)
    for repeat in range(args.warmup + args.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            contenders[name].step(ids[:, -1:])
    steps = {name: contender.seconds[args.warmup :] for name, contender in contenders.items()}
    quartiles = {name: statistics.quantiles(seconds, n=4) for name, seconds in steps.items()}
    sizes = cache_size(config, args.dtype)
    return {
        "checkpoint": args.checkpoint,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "dtype": str(args.dtype),
        "batch": args.batch,
        "context": args.context,
        "layers_changed": contenders["latent"].layers,
        "cache_bytes": cache,
        "cache_ratio": cache["latent"] / cache["ordinary"],
        "cache_ratio_by_config": sizes.latent / sizes.ordinary,
        "prefill_seconds": prefill,
        "step_milliseconds": {name: [1e3 * second for second in each] for name, each in quartiles.items()},
        "step_ratio": quartiles["latent"][1] / quartiles["ordinary"][1],
        "step_ratio_values": quartiles["values"][1] / quartiles["ordinary"][1],
        "step_ratio_fused": quartiles["latent fused"][1] / quartiles["ordinary fused"][1],
    }


def show(result: dict[str, Any]) -> None:
    table = Table("", "cache, MB", "step, ms: quartiles", "prefill, s")
    for name, milliseconds in result["step_milliseconds"].items():
        quartiles = " / ".join(f"{each:.1f}" for each in milliseconds)
        table.add_row(
            name, f"{result['cache_bytes'][name] / 1e6:.2f}", quartiles, f"{result['prefill_seconds'][name]:.2f}"
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--quantised", default=[], type=lambda text: text.split(","), help="as in fp8,quanto-4")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    result = measure(parser.parse_args(arguments))
    show(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
