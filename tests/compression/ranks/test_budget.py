"""From a budget to ranks, and the exact accounting: hand-worked numbers, real files, and budgets drawn at random."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from families import tiny_config, tiny_model
from runs import pair_params, pairs, ranks_in, target
from svdllm.checkpoint.tensors import (
    file_bytes,
    num_params,
    shard_names,
    stored_tensors,
    tensor_bytes,
)
from svdllm.common.errors import InputError
from svdllm.compression.forms.layout import compressed_tensors
from svdllm.compression.ranks import Evidence
from svdllm.compression.ranks.budget import choose_forms
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.ranks.strs import candidate_ranks
from svdllm.compression.ranks.uniform import exact_floor, fill_budget, uniform_rank, uniform_ranks
from svdllm.compression.recipe import PLAIN, Recipe
from svdllm.models.discover import discover
from svdllm.models.low_rank import low_rank_config, register_all
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure, bias_corrected

register_all()


def plain(**settings: Any) -> Recipe:
    return Recipe(**(PLAIN | {"forms": None if "ranks" in settings else ("pair",)} | settings))


def ranks_of(recipe: Recipe, structure: Structure, stored: Any, evidence: Evidence | None = None) -> dict[str, int]:
    return ranks_in(choose_forms(recipe, structure, WrittenFiles(stored, structure.targets), evidence).forms)


def made_up(
    shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32, others: int = 1000
) -> tuple[Structure, Any]:
    """A structure of targets ``b.0``, ``b.1``, ... of some shapes, and its stored tensors."""
    targets = [target(*shape, name=f"b.{index}") for index, shape in enumerate(shapes)]
    structure = Structure(blocks=("b",), targets=tuple(targets), num_outputs=(0,))
    stored = {"embedding.weight": ((others,), dtype)}
    return structure, stored | {f"{t.name}.weight": ((t.out_features, t.in_features), dtype) for t in targets}


def tiny(family: str = "llama", **overrides: Any) -> tuple[Structure, Any]:
    source = open_source(tiny_model(family, **overrides))
    skeleton = build_skeleton(source.config)
    return discover(skeleton), stored_tensors(source, skeleton)


@pytest.fixture(scope="module")
def llama() -> tuple[Structure, Any]:
    return tiny("llama")


def generated(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda low, high: int(torch.randint(low, high, (), generator=generator))


# --- one linear ---


@pytest.mark.parametrize(
    ("out_features", "in_features", "ratio", "rank"),
    [
        (576, 576, 0.2, 230),  # 0.8 * 288 = 230.4
        (192, 576, 0.2, 115),  # 0.8 * 144 = 115.2
        (1536, 576, 0.2, 335),  # 0.8 * 418.9 = 335.1
        (576, 1536, 0.2, 335),
        (4096, 4096, 0.2, 1638),  # 0.8 * 2048 = 1638.4
        (11008, 4096, 0.4, 1791),  # 0.6 * 2985.2 = 1791.1
        (20, 20, 0.1, 9),  # 0.9 * 10 = 9 exactly
        (20, 20, 0.3, 7),  # 0.7 * 10 = 7 exactly
        (200, 200, 0.3, 70),
        (580, 580, 0.1, 261),  # 0.9 * 290 = 261 exactly
        (8, 8, 0.999, 0),
        (8, 8, 1e-6, 3),  # 4 is break-even
    ],
)
def test_uniform_rank_by_hand(out_features: int, in_features: int, ratio: float, rank: int):
    assert uniform_rank(target(out_features, in_features), ratio) == rank


def test_uniform_rank_is_the_exact_floor_where_floats_are_not():
    """Against rational arithmetic on every size and every decimal ratio: 0.1, 0.2, ... hit integers often."""
    for size in range(2, 400, 2):
        for tenths in range(1, 10):
            exact = floor((1 - Fraction(tenths, 10)) * size * size / (2 * size))
            assert uniform_rank(target(size, size), tenths / 10) == exact, (size, tenths)


def test_exact_floor_by_hand():
    assert exact_floor(7.999999999999999) == 8
    assert exact_floor(8.000000000000002) == 8
    assert exact_floor(7.99) == 7
    assert exact_floor(0.0) == 0


@pytest.mark.parametrize(("round_to", "rank"), [(1, 230), (8, 224), (64, 192), (230, 230), (231, 0)])
def test_ranks_are_rounded_down_to_a_multiple(round_to: int, rank: int):
    assert uniform_rank(target(576, 576), 0.2, round_to) == rank


def test_break_even_is_never_reached():
    for shape in ((8, 8), (7, 9), (1, 50), (50, 1), (2, 2), (576, 1536), (3, 5)):
        linear = target(*shape)
        rank = linear.break_even_rank
        assert pair_params(linear, rank) < linear.num_weights <= pair_params(linear, rank + 1)
        for round_to in (1, 2, 8):
            for ratio in (1e-12, 1e-9, 1e-3):
                assert uniform_rank(linear, ratio, round_to) <= rank
    assert target(8, 8).break_even_rank == 3  # 4 * 16 = 64: as large as the matrix
    assert target(7, 9).break_even_rank == 3
    assert target(1, 50).break_even_rank == 0


def test_uniform_ranks_names_every_target():
    targets = [target(576, 576, "q"), target(192, 576, "k")]
    assert uniform_ranks(targets, 0.2) == {"q": 230, "k": 115}


# --- filling a budget ---


def test_fill_budget_by_hand():
    """Two 8 x 8 targets at 16 parameters a rank: 80 buys 5 ranks, 3 of them for the first by name."""
    targets = [target(8, 8, "a"), target(8, 8, "b")]
    assert fill_budget(targets, 80) == {"a": 3, "b": 2}
    assert fill_budget(targets, 79) == {"a": 2, "b": 2}
    assert fill_budget(targets, 32) == {"a": 1, "b": 1}
    assert fill_budget(targets, 31) is None
    assert fill_budget(targets, 10**6) == {"a": 3, "b": 3}
    assert fill_budget(targets, 79, round_to=2) == {"a": 2, "b": 2}
    assert fill_budget(targets, 63, round_to=2) is None
    assert fill_budget(targets, 10**6, round_to=3) == {"a": 3, "b": 3}
    assert fill_budget(targets, 95, round_to=3) is None
    assert fill_budget(targets, 10**6, round_to=4) == {"a": 0, "b": 0}


def test_what_is_left_goes_to_the_target_that_rounding_took_most_from():
    """Keeping just under x = 3/4, the exact ranks 12x, 2.1x and 2.4x leave 9-, 1.575 and 1.8: 8, 1 and 1 for 404.

    10 more buy no rank of the first (48), but one of the third, which lost 0.8.
    """
    targets = [target(24, 24, "a"), target(3, 7, "b"), target(4, 6, "c")]
    assert fill_budget(targets, 404) == {"a": 8, "b": 1, "c": 1}
    assert fill_budget(targets, 414) == {"a": 8, "b": 1, "c": 2}


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.33, 0.6, 0.85])
def test_the_ranks_of_a_filled_budget_are_uniform(ratio: float):
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    targets = [target(*shape, name=str(index)) for index, shape in enumerate(shapes)]
    uniform = uniform_ranks(targets, ratio)
    filled = fill_budget(targets, sum(pair_params(t, uniform[t.name]) for t in targets))
    assert filled is not None
    assert max(abs(filled[name] - uniform[name]) for name in uniform) <= 1


def check_budget(recipe: Recipe, structure: Structure, stored: Any) -> bool:
    """Whether the budget could be met; asserts that it then is, to within one rank step."""
    by_name = {t.name: t for t in structure.targets}
    try:
        ranks = ranks_of(recipe, structure, stored)
    except InputError as error:
        if not re.search("cannot be met|nothing to compress|leaves rank 0|nothing is left", str(error)):
            raise
        return False
    written = compressed_tensors(stored, structure.targets, pairs(ranks))
    for name, rank in ranks.items():
        assert 1 <= rank <= by_name[name].break_even_rank
        assert rank % recipe.round_to == 0
    size, budget, slack = num_params, recipe.target_params, 0
    if recipe.target_size is not None:
        size, budget = file_bytes, recipe.target_size
        slack = WrittenFiles(stored, structure.targets).most_bytes(pairs(ranks), budget) - file_bytes(written)
        assert 0 <= slack < 60 + 16 * len(written)  # the digits of a few offsets
    assert budget is not None
    assert size(written) <= budget
    for name, rank in ranks.items():
        overridden = any(re.search(pattern, name) for pattern in recipe.overrides)
        if not overridden and rank + recipe.round_to <= by_name[name].break_even_rank:
            larger = compressed_tensors(stored, structure.targets, pairs({**ranks, name: rank + recipe.round_to}))
            assert size(larger) + slack > budget, f"{name} could have had {rank + recipe.round_to}"
    return True


@pytest.mark.parametrize("kind", ["target_params", "target_size"])
@pytest.mark.parametrize("seed", range(40))
def test_a_budget_is_met_to_within_one_rank_step_for_random_shapes(kind: str, seed: int):
    draw = generated(seed)
    dtype = [torch.float32, torch.bfloat16, torch.float64][draw(0, 3)]
    shapes = [(draw(4, 300), draw(4, 300)) for _ in range(draw(1, 12))]
    structure, stored = made_up(shapes, dtype, others=draw(1, 5000))
    dense = num_params(stored) if kind == "target_params" else file_bytes(stored)
    met = 0
    for _ in range(6):
        overrides = {f"b.{draw(0, len(shapes))}$": [0.0, 0.5][draw(0, 2)] for _ in range(draw(0, 2))}
        settings = {kind: max(1, dense * draw(5, 100) // 100 + draw(0, 20)), "round_to": [1, 1, 2, 8][draw(0, 4)]}
        met += check_budget(plain(**settings, overrides=overrides), structure, stored)
    # Nine tenths of the parameters can be had unless rounding or overrides are in the way.
    assert check_budget(plain(**{kind: dense * 95 // 100}), structure, stored) or met or len(shapes) < 3


@pytest.mark.parametrize("kind", ["target_params", "target_size"])
@pytest.mark.parametrize("ignore", [[], ["down_proj"], [r"layers\.0", "q_proj"]])
def test_a_budget_is_met_on_a_tiny_llama(kind: str, ignore: list[str]):
    source = open_source(tiny_model("llama"))
    skeleton = build_skeleton(source.config)
    structure, stored = discover(skeleton, ignore), stored_tensors(source, skeleton)
    dense = num_params(stored) if kind == "target_params" else file_bytes(stored)
    met = 0
    for percent in range(20, 100, 3):
        for settings in ({}, {"overrides": {"v_proj": 0.0, "o_proj": 0.5}}, {"round_to": 2}):
            met += check_budget(plain(**{kind: dense * percent // 100}, **settings), structure, stored)
    assert met > 15


def test_every_budget_between_the_least_and_the_dense_model_can_be_met():
    structure, stored = made_up([(12, 20), (20, 12), (16, 16)], others=100)
    least = 100 + 32 * 3
    for budget in range(least, num_params(stored)):
        assert check_budget(plain(target_params=budget), structure, stored)
    assert not check_budget(plain(target_params=least - 1), structure, stored)


# --- the errors of budgets ---


def test_a_budget_that_cannot_be_met_tells_the_least(llama):
    structure, stored = llama
    with pytest.raises(InputError, match="--target-params 5,000 cannot be met: 4,256 lie outside") as caught:
        ranks_of(plain(target_params=5000), structure, stored)
    least = int(re.search(r"still has ([\d,]+)\. Raise", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    assert set(ranks_of(plain(target_params=least), structure, stored).values()) == {1}
    with pytest.raises(InputError, match="cannot be met"):
        ranks_of(plain(target_params=least - 1), structure, stored)
    with pytest.raises(InputError, match=r"--target-size 1,000 cannot be met: .*its least \(2\)"):
        ranks_of(plain(target_size=1000, round_to=2), structure, stored)


@pytest.mark.parametrize("kind", ["target_params", "target_size"])
def test_a_budget_above_the_dense_model_is_refused(llama, kind: str):
    flag = kind.replace("_", "-")
    with pytest.raises(InputError, match=rf"--{flag} 9,000,000 is not below what the dense model has \([\d,]+\)"):
        ranks_of(plain(**{kind: 9_000_000}), *llama)


def test_a_budget_of_all_the_dense_parameters_is_refused(llama):
    with pytest.raises(InputError, match="nothing to compress"):
        ranks_of(plain(target_params=num_params(llama[1])), *llama)


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        ([(576, 576), (48, 96)], {"ratio": 0.98}),
        ([(24, 96), (25, 90)], {"ratio": 0.999}),
        ([(576, 576)], {"ratio": 0.9, "round_to": 64}),
        ([(576, 576), (40, 60)], {"ratio": 0.2, "overrides": {"b.1": 0.99}}),
    ],
)
def test_following_the_advice_about_rank_zero_works(shapes: list[tuple[int, int]], settings: dict[str, Any]):
    structure, stored = made_up(shapes)
    with pytest.raises(InputError, match="leaves rank 0") as caught:
        ranks_of(plain(**settings), structure, stored)
    message = str(caught.value)
    assert ("multiples of" in message) == ("round_to" in settings)
    advice = float(re.search(r"use a ratio of at most ([\d.]+)\.$", message)[1])  # type: ignore[index]
    for key in ("ratio", "overrides"):
        if key in settings and (key == "overrides" or "overrides" not in settings):
            settings[key] = dict.fromkeys(settings[key], advice) if key == "overrides" else advice
    assert min(ranks_of(plain(**settings), structure, stored).values()) == settings.get("round_to", 1)


@pytest.mark.parametrize("settings", [{"ratio": 0.2}, {"target_params": 330_000}, {"target_size": 1_330_000}])
def test_a_linear_that_no_ratio_can_help_is_to_be_left_dense(settings: dict[str, Any]):
    structure, stored = made_up([(576, 576), (8, 32)])
    with pytest.raises(
        InputError, match=r"for 1 linears, for instance b\.1 \(8 x 32\): leave it dense with --ignore b\.1\."
    ):
        ranks_of(plain(**settings, round_to=8), structure, stored)
    rest = replace(structure, targets=structure.targets[:1])
    assert ranks_of(plain(**settings, round_to=8), rest, stored)["b.0"] > 0


# --- patterns ---


def test_explicit_ranks(llama):
    structure, stored = llama
    ranks = ranks_of(plain(ranks={"0.*q_proj": 5, "q_proj": "full", "down": 7}), structure, stored)
    prefix = "model.layers"
    assert ranks == {
        f"{prefix}.0.self_attn.q_proj": 5,
        f"{prefix}.1.self_attn.q_proj": 32,
        f"{prefix}.0.mlp.down_proj": 7,
        f"{prefix}.1.mlp.down_proj": 7,
    }
    with pytest.raises(InputError, match=r"ranks: 'nothing' matches none of the 14 linears \(model\.layers\.0"):
        ranks_of(plain(ranks={"nothing": 4}), structure, stored)
    for rank in (0, 17, -1):
        with pytest.raises(InputError, match=rf"'k_proj' asks for rank {rank} of .*k_proj, which can have 1 to 16"):
            ranks_of(plain(ranks={"k_proj": rank}), structure, stored)


def test_the_first_override_wins_and_zero_leaves_dense(llama):
    structure, stored = llama
    overrides = {r"layers\.0\..*q_proj": 0.5, "q_proj": 0.0, "k_proj": 0.25}
    ranks = ranks_of(plain(ratio=0.4, overrides=overrides), structure, stored)
    assert ranks["model.layers.0.self_attn.q_proj"] == 8  # 0.5 * 16
    assert "model.layers.1.self_attn.q_proj" not in ranks
    assert ranks["model.layers.1.self_attn.k_proj"] == 8  # 0.75 * 16 * 32 / 48
    assert ranks["model.layers.1.self_attn.o_proj"] == 9  # 0.6 * 16 = 9.6
    assert list(ranks) == [t.name for t in structure.targets if t.name in ranks]


def test_an_override_that_matches_nothing_is_an_error(llama):
    with pytest.raises(InputError, match="--override 'gone' matches none of the 14 compressed linears"):
        ranks_of(plain(ratio=0.4, overrides={"gone": 0.5}), *llama)


def test_overrides_that_leave_everything_dense_are_an_error(llama):
    with pytest.raises(InputError, match=r"leave all 14 linears dense: nothing is left to compress\. Drop one of '\.'"):
        ranks_of(plain(ratio=0.4, overrides={".": 0.0}), *llama)


# --- accounting ---


def test_compressed_tensors_by_hand():
    linear = replace(target(4, 6, "m.q"), has_bias=True)
    stored = {
        "m.q.bias": ((4,), torch.float32),
        "m.q.weight": ((4, 6), torch.bfloat16),
        "m.k.weight": ((4, 6), torch.bfloat16),
    }
    assert compressed_tensors(stored, [linear], pairs({"m.q": 2})) == {
        "m.q.svd_u.bias": ((4,), torch.float32),
        "m.q.svd_v.weight": ((2, 6), torch.bfloat16),
        "m.q.svd_u.weight": ((4, 2), torch.bfloat16),
        "m.k.weight": ((4, 6), torch.bfloat16),
    }
    assert num_params(stored) == 52
    assert tensor_bytes(stored) == 16 + 48 + 48
    assert tensor_bytes(stored, ["m.q.bias"]) == 16


def write(tensors: Any, path: Path) -> int:
    content = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    save_file(content, path, metadata={"format": "pt"})
    return path.stat().st_size


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int8]
DTYPES += [torch.int32, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_file_bytes_is_the_size_of_the_real_file(tmp_path: Path, dtype: torch.dtype):
    for length in range(1, 10):  # headers are padded to a multiple of eight
        tensors = {"x" * length: ((3, length), dtype), "b": ((7,), dtype), "scalar": ((), dtype)}
        assert file_bytes(tensors) == write(tensors, tmp_path / "model.safetensors")


def test_file_bytes_of_mixed_dtypes_is_exact(tmp_path: Path):
    for seed in range(30):
        draw = generated(seed)
        tensors = {
            f"{'layer' * draw(1, 4)}.{index}": ((draw(1, 40), draw(1, 90)), DTYPES[draw(0, len(DTYPES))])
            for index in range(draw(1, 30))
        }
        assert file_bytes(tensors) == write(tensors, tmp_path / "model.safetensors")


def test_file_bytes_of_a_compressed_model_in_shards_is_exact(tmp_path: Path):
    structure, stored = tiny("qwen2")
    ranks = ranks_of(plain(ratio=0.4), structure, stored)
    written = compressed_tensors(stored, structure.targets, pairs(ranks))
    for limit in (1, 3_000, 10_000, 10**9):
        sizes = [
            write({name: written[name] for name in names}, tmp_path / f"{number}.safetensors")
            for number, names in enumerate(shard_names(written, limit))
        ]
        assert file_bytes(written, limit) == sum(sizes)


def test_shards_keep_pairs_together_and_their_limit(llama):
    structure, stored = llama
    written = compressed_tensors(stored, structure.targets, pairs(ranks_of(plain(ratio=0.2), structure, stored)))
    for limit in (1, 2_000, 7_000, 20_000, 10**9):
        shards = shard_names(written, limit)
        assert [name for shard in shards for name in shard] == list(written)
        for shard in shards:
            names = {name.replace(".svd_u.weight", ".svd_v.weight") for name in shard}
            assert tensor_bytes(written, shard) <= limit or len(names) == 1
            for name in shard:
                if name.endswith(".svd_u.weight"):
                    assert name.replace(".svd_u.weight", ".svd_v.weight") in shard
        # A shard is only closed when what comes next would not have fitted.
        for shard, following in itertools.pairwise(shards):
            unit = following[:2] if following[0].endswith(".svd_v.weight") else following[:1]
            assert tensor_bytes(written, shard) + tensor_bytes(written, unit) > limit
    assert len(shard_names(written, 10**9)) == 1
    assert len(shard_names(written, tensor_bytes(written))) == 1
    assert len(shard_names(written, tensor_bytes(written) - 1)) == 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "phi3", "falcon"])
def test_num_params_is_what_transformers_counts(family: str):
    structure, stored = tiny(family)
    dense = AutoModelForCausalLM.from_config(tiny_config(family))
    assert num_params(stored) == dense.num_parameters()
    ranks = ranks_of(plain(ratio=0.3), structure, stored)
    settings = {"format_version": 1, "base_model_type": family, "ranks": ranks}
    model = AutoModelForCausalLM.from_config(low_rank_config(tiny_config(family), settings))
    written = compressed_tensors(stored, structure.targets, pairs(ranks))
    assert num_params(written) == model.num_parameters()
    assert set(written) <= set(model.state_dict())


def test_stored_tensors_are_the_same_from_a_config_as_from_the_weights():
    for tied in (True, False):
        source = open_source(tiny_model("llama", tie_word_embeddings=tied))
        skeleton = build_skeleton(source.config)
        known = stored_tensors(source, skeleton)
        source.config.dtype = torch.float32
        assert stored_tensors(replace(source, weights=None), skeleton) == known
        assert ("lm_head.weight" in known) != tied


def evidence_for(structure: Structure, recipe: Recipe, seed: int = 0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    energies = {
        t.name: torch.rand(t.full_rank, generator=generator, dtype=torch.float64).sort(descending=True).values
        for t in structure.targets
    }

    strs = recipe.allocation == "strs"
    ranks = {
        t.name: candidate_ranks(t, recipe.strs_ratios, recipe.round_to) if strs else [1] for t in structure.targets
    }
    probes = {name: {rank: float(torch.rand(1, generator=generator)) for rank in ranks[name]} for name in ranks}
    return Evidence(energies, probes)


@pytest.mark.parametrize("allocation", ["v2", "effective-rank", "loss", "strs"])
@pytest.mark.parametrize("seed", range(5))
def test_chosen_ranks_keep_every_budget(allocation: str, seed: int):
    structure, stored = made_up([(12, 8), (8, 8), (20, 8), (8, 20), (16, 16), (5, 9)])
    budgets = [{"ratio": ratio} for ratio in (0.1, 0.35, 0.6)]
    if allocation != "v2":
        dense = num_params(stored)
        budgets += [{"target_params": dense * 9 // 10}, {"target_size": 4 * dense}, {"target_params": dense - 1}]
    for budget in budgets:
        recipe = plain(**budget, allocation=allocation)
        evidence = evidence_for(structure, recipe, seed)
        written = compressed_tensors(stored, structure.targets, pairs(ranks_of(recipe, structure, stored, evidence)))
        if "ratio" in budget:
            limit = num_params(stored) - budget["ratio"] * structure.num_target_params
            assert num_params(written) <= limit + 1e-6
        elif "target_params" in budget:
            assert num_params(written) <= budget["target_params"]
        else:
            assert file_bytes(written) <= budget["target_size"]


def test_allocation_by_loss_spends_where_it_hurts_and_says_how_sure_it_is():
    structure, stored = made_up([(16, 16), (16, 16)])
    flat = torch.ones(16, dtype=torch.float64)
    evidence = Evidence({"b.0": flat, "b.1": flat}, {"b.0": {1: 9.0}, "b.1": {1: 0.1}})
    recipe = plain(ratio=0.4, allocation="loss")
    found = choose_forms(recipe, structure, WrittenFiles(stored, structure.targets), evidence)
    assert ranks_in(found.forms) == {"b.1": 1}  # 16 * 16 + 32 of 307: the other stays dense
    assert found.predicted_loss == pytest.approx(0.1)
    assert found.gap == 0.0


def test_added_biases_count_against_the_budget():
    structure, stored = made_up([(12, 8), (8, 8), (20, 8)])
    structure = bias_corrected(structure)
    for allocation in ("uniform", "v2", "effective-rank", "loss", "strs"):
        recipe = plain(ratio=0.3, allocation=allocation)
        ranks = ranks_of(recipe, structure, stored, evidence_for(structure, recipe))
        written = compressed_tensors(stored, structure.targets, pairs(ranks))
        assert num_params(written) <= num_params(stored) - 0.3 * structure.num_target_params
        assert all(f"{name}.svd_u.bias" in written for name in ranks)


def test_before_the_analysis_uniform_ranks_stand_in():
    structure, stored = made_up([(12, 8), (8, 8)])
    loss, uniform = (ranks_of(plain(ratio=0.3, allocation=name), structure, stored) for name in ("loss", "uniform"))
    assert loss == uniform


def test_ranks_may_say_dense(llama):
    structure, stored = llama
    ranks = ranks_of(plain(ranks={"q_proj": "dense", "_proj": 3}), structure, stored)
    assert set(ranks.values()) == {3}
    assert not any("q_proj" in name for name in ranks)
