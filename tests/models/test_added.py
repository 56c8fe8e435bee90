"""What the output of a linear is added to, against the residual stream that hooks see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig

from families import tiny_config, tiny_model
from svdllm.models.added import Added, Followed


def followed(module: nn.Module, run, *inputs) -> Tensor | None:
    """The sum; found alike where the run goes on to its end, with the same result."""
    added = Added()
    handle = module.register_forward_hook(lambda _module, _args, output: added.follow(output))
    try:
        with torch.no_grad(), added:
            run(*inputs)
    except Followed:
        pass
    finally:
        handle.remove()
    to_the_end = Added(ends_run=False)
    handle = module.register_forward_hook(lambda _module, _args, output: to_the_end.follow(output))
    with torch.no_grad(), to_the_end:
        ran = run(*inputs)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(ran, run(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(to_the_end.total, added.total, rtol=0, atol=0)
    return added.total


class Branches(nn.Module):
    """``r + scale * (first(x) [+ second(x)])`` and then a norm, as decoder blocks have it."""

    def __init__(self, *, parallel: bool = False, in_place: bool = False, scale: float = 1.0):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.parallel, self.in_place, self.scale = parallel, in_place, scale

    def forward(self, x: Tensor) -> Tensor:
        branch = self.first(x)
        if self.parallel:
            branch = branch + self.second(x)
        if self.scale != 1:
            branch = branch * self.scale
        if self.in_place:
            branch += x
        else:
            branch = x + branch
        return self.norm(branch) + 5


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("parallel", [False, True])
def test_everything_added_before_the_norm_counts_in_units_of_the_output(parallel: bool, scale: float, in_place: bool):
    torch.manual_seed(0)
    model, x = Branches(parallel=parallel, in_place=in_place, scale=scale), torch.randn(2, 3, 4)
    expected = x / scale + (model.second(x) if parallel else 0)
    total = followed(model.first, model, x.clone())
    assert total is not None
    torch.testing.assert_close(total, expected)


def test_an_output_that_goes_elsewhere_is_added_to_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    assert followed(model[0], lambda t: t + model(t), x) is None
    assert followed(model[2], model, x) is None
    total = followed(model[2], lambda t: t + model(t), x)
    assert total is not None
    assert torch.equal(total, x)


def granite() -> nn.Module:
    """A model that multiplies what it adds to the residual stream."""
    sizes = {name: getattr(tiny_config("llama"), name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    config = GraniteConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, residual_multiplier=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "attention", "mlp", "norm"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
        ("granite", "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"),
        ("gpt2", "attn.c_proj", "mlp.c_proj", "ln_2"),
        ("opt", "self_attn.out_proj", "fc2", "final_layer_norm"),
    ],
)
def test_the_residual_stream_of_real_blocks(family: str, attention: str, mlp: str, norm: str):
    model = granite() if family == "granite" else tiny_model(family).eval()
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    block, ids = blocks[0], torch.arange(2, 14)[None]
    seen: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(block=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        block.get_submodule(norm).register_forward_pre_hook(lambda _, args: seen.update(norm=args[0])),
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    scale = getattr(model.config, "residual_multiplier", 1.0)
    for name, stream in ((attention, "block"), (mlp, "norm")):
        total = followed(block.get_submodule(name), lambda: model(input_ids=ids, use_cache=False).logits)
        assert total is not None, name
        torch.testing.assert_close(total.reshape(seen[stream].shape), seen[stream] / scale)
