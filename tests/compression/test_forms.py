"""The table of forms: tensors, parameters and bytes are those of the real modules and files; budgets over all forms."""

from __future__ import annotations

import re
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM

from families import tiny_config, tiny_model
from runs import target
from svdllm.checkpoint.tensors import Tensors, file_bytes, num_params, stored_tensors
from svdllm.common.errors import InputError
from svdllm.compression.forms import FORMS, factors_of
from svdllm.compression.forms.layout import compressed_tensors, forms_entry, params
from svdllm.compression.ranks.budget import choose_forms, require_places
from svdllm.compression.ranks.predicted_sizes import WrittenFiles
from svdllm.compression.ranks.question import Allocation, Evidence
from svdllm.compression.ranks.uniform import uniform_rank
from svdllm.compression.recipe import PLAIN, Recipe
from svdllm.compression.recipe_files import make_recipe
from svdllm.models.chosen import Chosen
from svdllm.models.discover import discover
from svdllm.models.joint_keys_and_values import with_joint_keys_and_values
from svdllm.models.low_rank import FORMAT_VERSION, low_rank_config, register_all
from svdllm.models.open import open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure, Target, bias_corrected

register_all()
# Biases in all linears, in some and in none; Conv1D; gate and up projection in one; plain MLPs; shared inputs.
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "phi3", "gpt_neox", "falcon", "gemma3_text", "stablelm")
ALL = ("pair", "packed", "narrow")


def tiny(family: str, ignore: tuple[str, ...] = ()) -> tuple[Structure, Tensors]:
    source = open_source(tiny_model(family))
    skeleton = build_skeleton(source.config)
    return discover(skeleton, ignore), stored_tensors(source, skeleton)


def everything_in(form: str, structure: Structure) -> dict[str, Chosen]:
    """Every target that can have a form in it, in sizes that differ from target to target but not within an MLP."""
    chosen: dict[str, Chosen] = {}
    for number, single in enumerate(structure.targets):
        sizes = FORMS[form].sizes(single, 1)
        if sizes:
            position = single.block if FORMS[form].of_mlps else number
            chosen[single.name] = Chosen(form, sizes[(7 * position + 4) % len(sizes)])
    return chosen


def built(family: str, structure: Structure, forms: dict[str, Chosen], **settings: Any) -> Any:
    """The model that a checkpoint's config makes."""
    entry = forms_entry(structure.targets, forms)
    svdllm_entry = {"format_version": FORMAT_VERSION, "base_model_type": family, **entry, **settings}
    return AutoModelForCausalLM.from_config(low_rank_config(tiny_config(family), svdllm_entry))


def assert_tensors_are_those_of(model: Any, written: Tensors, stored: Tensors, path: Path) -> None:
    """Names, shapes and kinds of all tensors; the number of parameters; the size of a file with them."""
    state = model.state_dict()
    for name, (shape, dtype) in written.items():
        assert tuple(state[name].shape) == tuple(shape), name
        assert state[name].is_floating_point() == dtype.is_floating_point, name
    forgotten = set(state) - set(written) - (set(stored) | {"lm_head.weight"})
    assert not [name for name in forgotten if "svd_" in name or name.endswith(("order", "bias", "weight"))]
    assert num_params(written, {name for name, _ in model.named_buffers()}) == model.num_parameters()
    names = [name for name in state if name not in written]
    for name in names:  # buffers and tied tensors, which are in no file
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    save_model(model, str(path), metadata={"format": "pt"})
    assert file_bytes(written) == path.stat().st_size


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_of_the_modules(family: str, form: str, tmp_path: Path) -> None:
    structure, stored = tiny(family)
    forms = everything_in(form, structure)
    assert len(forms) == sum(bool(FORMS[form].sizes(t, 1)) for t in structure.targets) > 3
    model = built(family, structure, forms)
    for single in structure.targets:
        weights = [p for linear in single.linears for p in model.get_submodule(linear).parameters() if p.ndim == 2]
        assert params(single, forms.get(single.name)) == sum(weight.numel() for weight in weights), single.name
    written = compressed_tensors(stored, structure.targets, forms)
    assert_tensors_are_those_of(model, written, stored, tmp_path / "model.safetensors")


@pytest.mark.parametrize("form", ["pair", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_biases_that_a_correction_adds_are_counted(family: str, form: str, tmp_path: Path) -> None:
    structure, stored = tiny(family)
    structure = bias_corrected(structure)
    forms = everything_in(form, structure)
    model = built(family, structure, forms, bias_correction=True)
    written = compressed_tensors(stored, structure.targets, forms)
    assert_tensors_are_those_of(model, written, stored, tmp_path / "model.safetensors")
    added = sum(t.out_features for t in structure.targets if not t.has_bias)
    assert num_params(written) == num_params(compressed_tensors(stored, tiny(family)[0].targets, forms)) + added


def test_keys_and_values_together_are_a_pair_where_the_others_are_packed(tmp_path: Path) -> None:
    structure, stored = tiny("llama")
    structure = with_joint_keys_and_values(structure)
    both = next(t for t in structure.targets if t.parts)
    assert not FORMS["packed"].sizes(both, 1)
    assert [factors_of(t, ALL).name for t in structure.targets[:2]] == ["packed", "pair"]
    recipe = plain(ratio=0.3, allocation="uniform", forms=("pair", "packed"), overrides={"0.*v_proj": 0.5})
    forms = dict(choose_forms(recipe, structure, WrittenFiles(stored, structure.targets)).forms)
    assert forms[both.name] == Chosen("pair", 8)  # half of 32 * 32 weights, at 64 a rank
    assert {chosen.form for name, chosen in forms.items() if "v_proj" not in name} == {"packed"}
    written = compressed_tensors(stored, structure.targets, forms)
    assert_tensors_are_those_of(built("llama", structure, forms), written, stored, tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_by_hand(family: str) -> None:
    """A packed matrix has as many parameters as degrees of freedom; a narrower MLP loses whole features."""
    structure, _ = tiny(family)
    for single in structure.targets:
        out_features, in_features = single.out_features, single.in_features
        assert list(FORMS["packed"].sizes(single, 1)) == list(range(1, min(out_features, in_features)))
        assert params(single, Chosen("packed", 5)) == 5 * (out_features + in_features - 5)
        assert params(single, Chosen("pair", 5)) == 5 * (out_features + in_features)
        assert params(single, None) == out_features * in_features
    for name, members in structure.mlp_targets.items():
        width = next(mlp.width for mlp in structure.mlps if mlp.name == name)
        dense = sum(t.num_weights for t in members)
        assert dense % width == 0
        for kept in (1, 7, width - 1):
            assert sum(params(t, Chosen("narrow", kept)) for t in members) == dense // width * kept


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (12, 31), (31, 12), (576, 192), (64, 64)])
@pytest.mark.parametrize("round_to", [1, 4])
def test_the_uniform_rank_of_packed_factors_is_the_largest_that_fits(rows: int, columns: int, round_to: int) -> None:
    linear = target(rows, columns)
    for hundredths in range(1, 100, 3):
        kept = (1 - Fraction(hundredths, 100)) * rows * columns
        fitting = [r for r in range(min(rows, columns)) if r % round_to == 0 and r * (rows + columns - r) <= kept]
        assert uniform_rank(linear, hundredths / 100, round_to, ("packed",)) == fitting[-1]


# --- budgets over all forms ---


def plain(**settings: Any) -> Recipe:
    return Recipe(**(PLAIN | {"allocation": "loss"} | settings))


def evidence_for(structure: Structure, seed: int) -> Evidence:
    """Made-up spectra and curves that fall, and probes of everything."""
    generator = torch.Generator().manual_seed(seed)

    def falling(length: int) -> torch.Tensor:
        return torch.rand(length, generator=generator, dtype=torch.float64).sort(descending=True).values + 1e-3

    energies = {t.name: falling(t.full_rank) for t in structure.targets}
    narrowings = {mlp.name: torch.cat([falling(mlp.width), torch.zeros(1)]).double() for mlp in structure.mlps}
    probes = {name: {1: float(torch.rand(1, generator=generator))} for name in (*energies, *narrowings)}
    return Evidence(energies, probes, narrowings=narrowings)


def members_of(name: str, chosen: Chosen, structure: Structure) -> list[str]:
    if not FORMS[chosen.form].of_mlps:
        return [name]
    return next(
        [t.name for t in members] for members in structure.mlp_targets.values() if name in {t.name for t in members}
    )


@pytest.mark.parametrize("forms", [ALL, ("packed",), ("narrow",), ("pair", "narrow"), ("dense", "packed")], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_budgets_are_kept_and_used(family: str, forms: tuple[str, ...]) -> None:
    """In parameters and bytes of real models: nothing could be one size larger."""
    structure, stored = tiny(family)
    files, sized = WrittenFiles(stored, structure.targets), {target.name: target for target in structure.targets}
    met = 0
    for seed, percent in enumerate((92, 80, 66, 55)):
        for kind, count in (("target_params", num_params), ("target_size", file_bytes)):
            budget = count(stored) * percent // 100
            for round_to in (1, 4):
                recipe = plain(**{kind: budget}, forms=forms, round_to=round_to)
                try:
                    found = choose_forms(recipe, structure, files, evidence_for(structure, seed))
                except InputError:  # a high budget of few forms cannot be met
                    assert percent < 80
                    continue
                met += 1
                assert {chosen.form for chosen in found.forms.values()} <= set(forms)
                spent = count(compressed_tensors(stored, structure.targets, found.forms))
                assert spent <= budget
                slack = files.most_bytes(found.forms, budget) - spent if count is file_bytes else 0
                assert found.gap is not None
                if found.gap > 0:
                    continue
                for name, chosen in found.forms.items():
                    assert chosen.size % round_to == 0
                    larger = Chosen(chosen.form, chosen.size + round_to)
                    if larger.size in FORMS[chosen.form].sizes(sized[name], round_to):
                        raised = {**found.forms, **dict.fromkeys(members_of(name, chosen, structure), larger)}
                        written = compressed_tensors(stored, structure.targets, raised)
                        assert count(written) + slack + 64 * (slack > 0) > budget, (name, larger)
    assert met > 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_mlp_is_narrowed_as_a_whole(family: str) -> None:
    structure, stored = tiny(family)
    seen = set()
    for seed in range(6):
        recipe = plain(ratio=0.45)
        found = choose_forms(recipe, structure, WrittenFiles(stored, structure.targets), evidence_for(structure, seed))
        for members in structure.mlp_targets.values():
            own = {found.forms.get(t.name) for t in members}
            narrowed = any(chosen is not None and chosen.form == "narrow" for chosen in own)
            assert len(own) == 1 or not narrowed
            seen.add(narrowed)
        kept = sum(params(t, found.forms.get(t.name)) for t in structure.targets)
        assert kept <= (1 - 0.45) * structure.num_target_params
    assert seen == {True, False}


def test_more_forms_lose_no_more() -> None:
    """Every choice of fewer forms is a choice of more; packed factors lose what a pair of the same rank loses."""
    structure, stored = tiny("llama")
    files = WrittenFiles(stored, structure.targets)
    for seed in range(5):
        evidence = evidence_for(structure, seed)
        losses = [
            choose_forms(plain(ratio=0.4, forms=forms), structure, files, evidence).predicted_loss
            for forms in (("pair",), ("pair", "narrow"), ALL, ("packed", "narrow"), ("packed",))
        ]
        assert None not in losses
        pair, with_narrow, of_all, of_two, packed = (float(loss or 0) for loss in losses)
        slack = 1e-3 * pair
        assert of_all <= with_narrow + slack <= pair + 2 * slack
        assert of_all == pytest.approx(of_two, rel=1e-3)  # a pair is never smaller
        assert of_two <= packed + slack <= pair + 2 * slack


def test_the_prediction_of_a_unit_is_its_probe_scaled_by_its_curve() -> None:
    """Two numbers by hand: a divergence of 0.5 at rank 1 and one of 0.3 at width 20 of an MLP."""
    structure, stored = tiny("llama")
    mlp = structure.mlps[0]
    flat = {t.name: torch.ones(t.full_rank, dtype=torch.float64) for t in structure.targets}
    tails = torch.arange(mlp.width, -1, -1, dtype=torch.float64)
    only = next(t for t in structure.targets if t.name.endswith("0.self_attn.q_proj"))
    probes = {t.name: {1: 0.5 if t is only else 50.0} for t in structure.targets}
    probes |= {other.name: {20: 0.3 if other is mlp else 30.0} for other in structure.mlps}
    evidence = Evidence(flat, probes, narrowings={other.name: tails for other in structure.mlps})

    def found(budget: int) -> Allocation:
        files = WrittenFiles(stored, structure.targets)
        return choose_forms(plain(target_params=budget), structure, files, evidence)

    dense = num_params(stored)
    one = found(dense - 1)  # rank 31 of the 32 x 32 query, and one feature less of the MLP, of 96 weights
    loss_of_rank, loss_of_width = 0.5 / 31, 0.3 / (mlp.width - 20)
    assert one.predicted_loss == pytest.approx(min(loss_of_rank, loss_of_width))
    assert set(one.forms.values()) == {Chosen("narrow", mlp.width - 1)}
    ten = found(dense - 10 * 96)
    assert ten.predicted_loss == pytest.approx(10 * loss_of_width)
    assert set(ten.forms.values()) == {Chosen("narrow", mlp.width - 10)}
    assert set(ten.forms) == set(mlp.linears)


def test_an_mlp_of_which_an_override_fixes_a_linear_is_not_narrowed() -> None:
    structure, stored = tiny("llama")
    files = WrittenFiles(stored, structure.targets)
    for ratio in (0.0, 0.5):
        recipe = plain(ratio=0.5, overrides={"0.mlp.up_proj": ratio}, forms=("packed", "narrow"))
        found = choose_forms(recipe, structure, files, evidence_for(structure, 1)).forms
        first = [found.get(name) for name in structure.mlps[0].linears]
        assert "narrow" not in {chosen.form for chosen in first if chosen is not None}
        assert found.get("model.layers.0.mlp.up_proj") == (Chosen("packed", uniform_packed(48, 32)) if ratio else None)


def uniform_packed(rows: int, columns: int) -> int:
    half = rows * columns / 2
    return max(r for r in range(min(rows, columns)) if r * (rows + columns - r) <= half)


@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"target_params": 15_000}, {"target_size": 64_000}])
def test_uniform_ranks_of_packed_factors(budget: dict[str, Any]) -> None:
    structure, stored = tiny("llama")
    files = WrittenFiles(stored, structure.targets)
    recipe = plain(allocation="uniform", forms=("packed",), **budget)
    found = choose_forms(recipe, structure, files).forms
    assert {chosen.form for chosen in found.values()} == {"packed"}
    assert len(found) == len(structure.targets)
    written = compressed_tensors(stored, structure.targets, found)
    if "ratio" in budget:
        for single in structure.targets:
            kept = floor(0.7 * single.num_weights)
            assert params(single, found[single.name]) <= kept
            assert params(single, Chosen("packed", found[single.name].size + 1)) > kept
        return
    count = num_params if "target_params" in budget else file_bytes
    limit = next(iter(budget.values()))
    step = 80 * 4 if count is file_bytes else 80
    assert limit - step - 100 < count(written) <= limit


# --- explicit forms ---


def given(structure: Structure, stored: Tensors, ranks: dict[str, Any]) -> dict[str, Chosen]:
    recipe = make_recipe({"ranks": ranks})
    return dict(choose_forms(recipe, structure, WrittenFiles(stored, structure.targets)).forms)


def test_explicit_forms() -> None:
    structure, stored = tiny("llama")
    ranks = {r"0\.mlp": {"narrow": 20}, "gate_proj": 5, "down": "full", "q_proj": {"packed": 31}, "k_proj": {"pair": 3}}
    found = given(structure, stored, ranks)
    first, second = (f"model.layers.{block}" for block in (0, 1))
    assert found == {
        f"{first}.self_attn.q_proj": Chosen("packed", 31),
        f"{first}.self_attn.k_proj": Chosen("pair", 3),
        **{f"{first}.mlp.{leaf}_proj": Chosen("narrow", 20) for leaf in ("gate", "up", "down")},
        f"{second}.self_attn.q_proj": Chosen("packed", 31),
        f"{second}.self_attn.k_proj": Chosen("pair", 3),
        f"{second}.mlp.gate_proj": Chosen("pair", 5),
        f"{second}.mlp.down_proj": Chosen("pair", 32),
    }


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"q_proj": {"packed": 32}}, r"'q_proj' asks for packed 32 of \S*q_proj, which can have 1 to 31"),
        ({"q_proj": {"packed": 0}}, r"'q_proj' asks for packed 0 of \S*q_proj, which can have 1 to 31"),
        ({"mlp": {"narrow": 48}}, r"'mlp' asks for narrow 48 of \S*mlp\.\S*, which can have 1 to 47"),
        ({"gone": {"packed": 4}}, r"'gone' matches none of the 14 linears"),
        ({"gone": {"narrow": 4}}, r"'gone' matches none of the 2 MLPs \(\S+, \.\.\.\)"),
        ({"up_proj": 4, "mlp": {"narrow": 4}}, r"narrowed as a whole, but an earlier pattern gives one of its linears"),
    ],
)
def test_explicit_forms_that_cannot_be(ranks: dict[str, Any], message: str) -> None:
    structure, stored = tiny("llama")
    with pytest.raises(InputError, match=message):
        given(structure, stored, ranks)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"packt": 4}, "expected a form of dense, pair, packed, narrow, .* with its size"),
        ({"packed": 4, "pair": 4}, "expected a form of dense, pair, packed, narrow, .* with its size"),
        ({}, "expected a form of dense, pair, packed, narrow, .* with its size"),
        ({"packed": "many"}, "ranks"),
        ("half", "ranks"),
    ],
)
def test_entries_that_are_none(wanted: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe({"ranks": {"q_proj": wanted}})


# --- forms that cannot be used ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forms": ("packt",)}, "unknown form 'packt'; known are dense, pair, packed, narrow"),
        ({"forms": ()}, r"forms \(none\) leave every linear as it is; name at least one of pair, packed, narrow"),
        ({"forms": ("dense",)}, "forms dense leave every linear as it is; name at least one of pair, packed, narrow"),
        (
            {"forms": ("packed",), "elastic": True},
            "form packed cannot be used: the sizes of an elastic checkpoint are parts",
        ),
        (
            {"forms": ("pair", "narrow"), "elastic": True},
            "form narrow cannot be used: the sizes of an elastic checkpoint are parts",
        ),
        ({"forms": ("narrow",), "bias_correction": True}, "form narrow cannot be used: bias_correction"),
        (
            {"forms": ("narrow",), "method": "asvd", "allocation": "loss"},
            "fitted to the Gram .*, and method asvd has none",
        ),
        ({"forms": ("narrow",), "allocation": "uniform"}, "allocation uniform does not choose it; use allocation loss"),
        (
            {"forms": ("packed",), "allocation": "v2"},
            "allocation v2 does not choose it; use allocation uniform or loss",
        ),
        ({"forms": ("packed",), "ratio": None, "ranks": {"q": 3}}, "forms does nothing to explicit ranks"),
        (
            {"ratio": None, "ranks": {"mlp": {"narrow": 3}}, "method": "svd"},
            "form narrow cannot be used: it is fitted to the Gram",
        ),
        (
            {"ratio": None, "ranks": {"mlp": {"narrow": 3}}, "bias_correction": True},
            "form narrow cannot be used: bias_corr",
        ),
    ],
    ids=str,
)
def test_forms_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe({"ratio": 0.3} | settings)


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, ALL),
        ({"forms": ("narrow", "dense")}, ("narrow", "dense")),
        ({"elastic": True}, ("pair",)),
        ({"bias_correction": True}, ("pair", "packed")),
        ({"method": "asvd", "allocation": "loss"}, ("pair", "packed")),
        ({"allocation": "uniform"}, ("pair",)),
        ({"allocation": "uniform", "forms": ("packed",)}, ("packed",)),
        ({"allocation": "v2"}, ("pair",)),
    ],
    ids=str,
)
def test_forms_that_are_used(settings: dict[str, Any], used: tuple[str, ...]) -> None:
    """By default all that the rest of the recipe allows."""
    recipe = make_recipe({"ratio": 0.3} | settings)
    assert recipe.used_forms == used
    assert make_recipe(recipe.to_dict()).used_forms == used


def test_a_form_without_a_place_is_refused_where_it_is_named() -> None:
    structure, stored = tiny("llama", ignore=("up_proj",))
    assert not structure.mlps
    with pytest.raises(InputError, match=r"--forms narrow needs MLPs .* Leave narrow out"):
        require_places(plain(ratio=0.3, forms=("packed", "narrow")), structure)
    require_places(plain(ratio=0.3), structure)
    found = choose_forms(
        plain(ratio=0.3), structure, WrittenFiles(stored, structure.targets), evidence_for(structure, 0)
    )
    assert found.forms
    with pytest.raises(InputError, match=r"'mlp' asks for a narrower MLP, and this model has none"):
        given(structure, stored, {"mlp": {"narrow": 4}})


def test_a_budget_that_no_form_meets_tells_the_least() -> None:
    structure, stored = tiny("llama")
    files, evidence = WrittenFiles(stored, structure.targets), evidence_for(structure, 0)
    for forms in (ALL, ("narrow",), ("pair",)):
        with pytest.raises(InputError, match="--target-params 4,500 cannot be met") as caught:
            choose_forms(plain(target_params=4500, forms=forms), structure, files, evidence)
        least = int(re.search(r"still has ([\d,]+)\. Raise", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
        found = choose_forms(plain(target_params=least, forms=forms), structure, files, evidence)
        assert num_params(compressed_tensors(stored, structure.targets, found.forms)) == least
        with pytest.raises(InputError, match="cannot be met"):
            choose_forms(plain(target_params=least - 1, forms=forms), structure, files, evidence)


def test_targets_of_the_table() -> None:
    """Every row says which curve it follows; only dense has none."""
    in_bits = {f"int{bits}": "rounding" for bits in (8, 6, 5, 4, 3, 2)}
    assert {name: row.curve for name, row in FORMS.items()} == {
        "dense": "",
        **dict.fromkeys(("pair", "packed", "pair-int8", "packed-int8"), "truncation"),
        "narrow": "narrowing",
        **in_bits,
        **{f"int{bits}-corrected": "correction" for bits in (4, 3, 2)},
    }
    single: Target = target(6, 9)
    assert not FORMS["narrow"].sizes(single, 1)
