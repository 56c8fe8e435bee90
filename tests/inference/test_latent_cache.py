"""Latents in the cache: the logits of the ordinary cache, in the bytes that the ranks say."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from families import ATTENTIONS, low_rank_model, stored_ranks, tiny_model, tiny_tokens
from generation import WAYS, assert_same, generated, in_parts
from svdllm import InputError, UnsupportedModelError, fuse_factors
from svdllm.common.progress import Reporter
from svdllm.inference.cache_names import CACHE_NAMES, cache_name, cache_of
from svdllm.inference.latent_cache import cache_bytes, cache_size, use_latent_cache, use_ordinary_cache
from svdllm.inference.prepare import prepare

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "opt", "stablelm", *ATTENTIONS]


def random_model(family: str, **settings: Any) -> Any:
    """A low-rank model of which biases and norms are random, too, and scores differ much."""
    model, generator = low_rank_model(family, **settings), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif ".svd_" in name:
                parameter.mul_(2)
    return model


def latent_model(family: str = "llama", **settings: Any) -> Any:
    model = random_model(family, **settings)
    assert use_latent_cache(model) == 2
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_ordinary_cache(family: str, implementation: str) -> None:
    """A prompt, single tokens, few tokens (which work with the latents), many (which rebuild)."""
    ids, lengths = tiny_tokens(2, 26), [7, 1, 1, 2, 14, 1]
    settings = {"attn_implementation": implementation}
    ordinary, latent = random_model(family, **settings), latent_model(family, **settings)
    assert ordinary.config._attn_implementation == latent.config._attn_implementation == implementation
    assert_same(in_parts(latent, ids, lengths), in_parts(ordinary, ids, lengths))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_generates_the_same(family: str, way: str) -> None:
    ordinary, latent = generated(random_model(family), **WAYS[way]), generated(latent_model(family), **WAYS[way])
    assert torch.equal(latent.sequences, ordinary.sequences)
    assert_same(latent.logits, ordinary.logits)
    assert cache_bytes(cache_of(latent)) < cache_bytes(cache_of(ordinary))


@torch.no_grad()
def test_a_cache_that_is_cut_back() -> None:
    """Prompt lookup tries several tokens at once, and takes those back that are wrong."""
    ids = tiny_tokens(1, 4).repeat(1, 5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    found = [model.generate(ids, **settings) for model in (latent_model(), random_model("llama"))]
    assert torch.equal(*found)


@pytest.mark.parametrize("lengths", [[1] * 24, [20, 1, 3], [5, 14, 5]])
@pytest.mark.parametrize("static", [False, True])
def test_windows(static: bool, lengths: list[int]) -> None:
    """A layer with a window of 8 slots, over three times as many tokens."""
    ids, logits = tiny_tokens(2, 24), []
    for model in (latent_model("gemma3_text"), random_model("gemma3_text")):
        cache = StaticCache(config=model.config, max_cache_len=32) if static else None
        logits.append(in_parts(model, ids, lengths, cache))
    assert_same(*logits)


@pytest.mark.parametrize("dense", ["k_proj", "v_proj"])
@pytest.mark.parametrize("static", [False, True])
def test_a_projection_left_dense_is_kept_as_ever(dense: str, static: bool) -> None:
    ids, logits, sizes = tiny_tokens(2, 12), [], []
    for model in (latent_model(dense=(dense,)), random_model("llama", dense=(dense,))):
        cache: Any = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()
        logits.append(in_parts(model, ids, [5, 1, 1, 5], cache))
        sizes.append(cache_bytes(cache) // (2 * 12))
    assert_same(*logits)
    assert tuple(sizes[::-1]) == cache_size(model.config, torch.float32)


def test_values_alone() -> None:
    model, cache = random_model("llama"), DynamicCache()
    assert use_latent_cache(model, keys=False) == 2
    found = in_parts(model, tiny_tokens(), [5, 1, 1, 5], cache)
    assert_same(found, in_parts(random_model("llama"), tiny_tokens(), [12]))
    assert cache_bytes(cache) == 2 * 12 * 4 * (16 + 7 + 16 + 5)


def test_layers_with_neither_are_left_alone() -> None:
    model = random_model("llama", dense=("0.self_attn.k_proj", "0.self_attn.v_proj"))
    assert use_latent_cache(model) == 1
    assert_same(
        in_parts(model, tiny_tokens(), [5, 1, 6]),
        in_parts(random_model("llama", dense=("0.self_attn.k_proj", "0.self_attn.v_proj")), tiny_tokens(), [12]),
    )
    assert use_latent_cache(random_model("llama", dense=("k_proj", "v_proj"))) == 0


def test_who_asks_for_latents_where_none_can_be_kept_is_told() -> None:
    for model, warned in ((tiny_model("llama"), True), (random_model("llama"), False)):
        for kind in ("ordinary", "latent", "latent-values"):
            reporter = Reporter()
            made = prepare(model, kv_cache=kind, reporter=reporter)
            assert bool(reporter.warnings) == (warned and kind != "ordinary")
            assert made.latent_layers == (0 if warned or kind == "ordinary" else 2)
            use_ordinary_cache(model)


def test_bytes_by_hand() -> None:
    """Two layers of two heads of width 8: 2 * 2 * 16 floats a token. Ranks run 5, 6, 7 over the linears of a block."""
    model = latent_model()
    assert [stored_ranks(model.config)[f"model.layers.{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "kv"] == [
        6,
        7,
        7,
        5,
    ]
    assert cache_size(model.config, torch.float32) == (4 * 64, 4 * 25)
    assert cache_size(model.config, torch.bfloat16) == (2 * 64, 2 * 25)
    caches = [DynamicCache(), DynamicCache()]
    for cache, each in zip(caches, (random_model("llama"), model), strict=True):
        in_parts(each, tiny_tokens(3, 10), [6, 1, 1, 1, 1], cache)
    assert [cache_bytes(cache) for cache in caches] == [30 * 4 * 64, 30 * 4 * 25]


def operations_of_a_step(model: Any, past: int) -> int:
    cache = DynamicCache()
    in_parts(model, tiny_tokens(1, past), [past], cache)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tiny_tokens(1, 1), **{cache_name(model): cache})
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "per_slot"),
    [
        ("opt", 2 * 4 * (5 + 6)),  # neither keys nor values are rebuilt: all four heads read the latents
        ("llama", (16 * 6 + 4 * 8 + 4 * 7) + (16 * 7 + 4 * 8 + 4 * 5)),  # keys are, for the rotation
    ],
)
def test_operations_of_a_step(family: str, per_slot: int) -> None:
    model = latent_model(family)
    ranks = stored_ranks(model.config)
    kept = [rank for name, rank in ranks.items() if name.endswith(("k_proj", "v_proj"))]
    assert sorted(kept) == sorted([5, 6, 5, 6] if family == "opt" else [6, 7, 7, 5])
    operations_of_a_step(model, 30)  # makes the angles of all these slots
    assert operations_of_a_step(model, 21) - operations_of_a_step(model, 20) == 2 * per_slot


def test_with_first_factors_fused() -> None:
    model = random_model("qwen2")
    expected = in_parts(model, tiny_tokens(), [12])
    assert fuse_factors(model) > 0
    assert use_latent_cache(model) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 1, 5]), expected)
    assert use_ordinary_cache(model) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 1, 5]), expected)


def test_there_and_back() -> None:
    model, plain = random_model("llama"), random_model("llama")
    classes, state = [type(module) for module in model.modules()], list(model.state_dict())
    assert use_latent_cache(model) == 2
    assert use_latent_cache(model) == 0
    assert list(model.state_dict()) == state
    assert_same(in_parts(copy.deepcopy(model), tiny_tokens(), [5, 1, 6]), in_parts(plain, tiny_tokens(), [12]))
    assert use_ordinary_cache(model) == 2
    assert use_ordinary_cache(model) == 0
    assert [type(module) for module in model.modules()] == classes
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    cache = DynamicCache()
    assert torch.equal(in_parts(model, tiny_tokens(), [5, 1, 6], cache), in_parts(plain, tiny_tokens(), [5, 1, 6]))
    assert cache_bytes(cache) == 2 * 12 * cache_size(model.config, torch.float32).ordinary


def test_without_a_cache_and_with_another_implementation() -> None:
    model, plain = latent_model(), random_model("llama")
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            found = model(input_ids=tiny_tokens(), use_cache=False).logits
        assert_same(found, in_parts(plain, tiny_tokens(), [12]))
        assert_same(in_parts(model, tiny_tokens(), [5, 1, 6]), in_parts(plain, tiny_tokens(), [12]))


def test_moved_to_another_dtype() -> None:
    model = latent_model()
    expected = in_parts(random_model("llama").double(), tiny_tokens(), [12])
    torch.testing.assert_close(in_parts(model.double(), tiny_tokens(), [5, 1, 6]), expected, atol=1e-6, rtol=1e-6)
    assert use_latent_cache(random_model("llama").bfloat16()) == 2


def test_compiled_steps_of_a_static_cache() -> None:
    """One graph for all steps."""
    model, plain = (random_model("llama", num_hidden_layers=1) for _ in range(2))
    use_latent_cache(model)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = tiny_tokens(1, 10)
    expected = in_parts(plain, ids, [10])
    logits = [in_parts(model, ids[:, :6], [6], cache)]
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    logits += [in_parts(model, ids[:, slot : slot + 1], [1], cache) for slot in range(6, 10)]
    assert_same(torch.cat(logits, dim=1), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_fused_projections_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"has a k_proj and a v_proj \(.*Attention"):
        use_latent_cache(random_model(family))


def test_angles_that_change_with_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaAttention \(model\.layers\.0\.self_attn\).*rope_type dynamic"
    ):
        use_latent_cache(random_model("llama", rope_parameters=rope))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_layers_that_call_their_cache_otherwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' argument has the name of another version of transformers than the model's."""
    forward, installed = LlamaAttention.forward, cache_name(LlamaAttention)

    def called(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return forward(self, hidden_states, **{installed if key == name else key: kwargs[key] for key in kwargs})

    def rename(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name if key == installed else key: value for key, value in kwargs.items()}

    ordinary, model = random_model("llama"), random_model("llama")
    signature = inspect.signature(forward)
    parameters = [p.replace(name=name if p.name == installed else p.name) for p in signature.parameters.values()]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expected = in_parts(ordinary, tiny_tokens(), [5, 1, 6])
    monkeypatch.setattr(LlamaAttention, "forward", called)
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.register_forward_pre_hook(rename, with_kwargs=True)
    assert use_latent_cache(model) == 2
    assert_same(in_parts(model, tiny_tokens(), [5, 1, 6]), expected)


def test_layers_without_a_cache_of_a_known_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdllm.inference.cache_names.CACHE_NAMES", ("another_name",))
    monkeypatch.setattr("svdllm.inference.latent_cache.CACHE_NAMES", ("another_name", "a_third"))
    with pytest.raises(
        UnsupportedModelError, match="hand its keys and values to a cache that it takes as another_name or a_third"
    ):
        latent_model()


@pytest.mark.parametrize(("family", "keys"), [("gemma2", True), ("gemma2", False), ("gpt_oss", False)])
def test_scores_that_are_capped_or_compete_with_a_sink_are_left_to_the_familys_own_attention(
    family: str, keys: bool
) -> None:
    """Gemma 2 caps scores, gpt-oss adds one that no token gets: a product with the latents would have neither."""
    ids, lengths = tiny_tokens(2, 16), [7, 1, 1, 2, 4, 1]
    settings = {"attn_implementation": "eager"}
    model = random_model(family, **settings)
    expected = in_parts(model, ids, lengths)
    assert use_latent_cache(model, keys=keys) == 2
    assert_same(in_parts(model, ids, lengths), expected)


def test_training_mode_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        use_latent_cache(random_model("llama").train())


def with_updates_by(update: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of Llama's attention, which hands what it makes to ``update``, with the cache before it."""
    forward, name = LlamaAttention.forward, cache_name(LlamaAttention)

    class Between:
        def __init__(self, cache: Any):
            self.cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

        def update(self, *args: Any, **kwargs: Any) -> Any:
            return update(self.cache, *args, **kwargs)

    @functools.wraps(forward)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, name: Between(kwargs[name])})

    return replaced


@pytest.mark.parametrize(
    ("factors", "why"),
    [((2.0, 1.0), "its keys are not what k_proj gives"), ((1.0, 2.0), "its values are not what v_proj gives")],
)
def test_unknown_ways_to_make_keys_and_values_are_refused(
    factors: tuple[float, float], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaling(cache: Any, keys: Tensor, values: Tensor, *rest: Any, **settings: Any) -> Any:
        return cache.update(factors[0] * keys, factors[1] * values, *rest, **settings)

    monkeypatch.setattr(LlamaAttention, "forward", with_updates_by(scaling))
    model = random_model("llama")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=why):
        use_latent_cache(model)
    assert [type(module) for module in model.modules()] == classes


def test_other_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something after the cache that nobody knows: the model is as it was."""

    def scaling(cache: Any, *given: Any, **settings: Any) -> Any:
        keys, values = cache.update(*given, **settings)
        return 1.5 * keys, values

    model = random_model("llama")
    monkeypatch.setattr(LlamaAttention, "forward", with_updates_by(scaling))
    expected = in_parts(model, tiny_tokens(), [5, 1, 6])
    with pytest.raises(UnsupportedModelError, match=r"cannot hold latents: the logits differ by .* of the largest"):
        use_latent_cache(model)
    assert torch.equal(in_parts(model, tiny_tokens(), [5, 1, 6]), expected)
