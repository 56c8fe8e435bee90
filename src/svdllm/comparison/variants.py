"""The table of variants, and the names by which ``svdllm compare`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdllm.common.errors import InputError, did_you_mean
from svdllm.comparison.compressed import Compressed, Pruned, Trained
from svdllm.comparison.fewer_experts import FewerExperts
from svdllm.comparison.foreign import Foreign
from svdllm.comparison.settings import DENSE
from svdllm.comparison.simulated.one_bit import DEFAULTS, METHOD
from svdllm.comparison.simulated.systems import System, find_system
from svdllm.comparison.simulated.variants import ONE_BIT, SIMULATED_SYSTEMS, OneBit, Quantised
from svdllm.comparison.variant import MadeBy, Maker, Variant
from svdllm.compression.recipe_files import PRESETS, load_settings, make_recipe, preset_settings
from svdllm.compression.recipe_parts import BUDGETS, OF_A_BUDGET
from svdllm.pruning.settings import METHODS as PRUNING_METHODS
from svdllm.pruning.settings import make_pruning
from svdllm.recovery import Recovery, make_recovery
from svdllm.recovery.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A named variant: settings of a recipe, a method of pruning, or a function that makes the model in another way.

    ``kind`` is the class of a variant that has a recipe: what is made with it.
    """

    settings: Mapping[str, Any] | None = None
    kind: Callable[..., Variant] = Compressed
    pruning: str | None = None
    make: Maker | None = None
    is_baseline: bool = False  # whether the table shows gains against it

    def variant(self, name: str, calibration: Mapping[str, Any]) -> Variant:
        """The variant, calibrated as all others."""
        if self.make is not None:
            return MadeBy(name=name, function=self.make)
        if self.pruning is not None:
            return Pruned(name=name, pruning=make_pruning({**calibration, "pruning": self.pruning}, f"method {name}"))
        return self.kind(name=name, recipe=make_recipe({**(self.settings or {}), **calibration}, f"method {name}"))


# The published methods with the ranks they are published with, and those of pruning; then the presets by their names.
VARIANTS: dict[str, Row] = {
    "svd": Row(settings={"method": "svd"}, is_baseline=True),
    "fwsvd": Row(settings={"method": "fwsvd"}, is_baseline=True),
    "asvd": Row(settings={"method": "asvd"}, is_baseline=True),
    "asvd-strs": Row(settings={"method": "asvd", "allocation": "strs"}, is_baseline=True),
    **{name: Row(pruning=name, is_baseline=True) for name in PRUNING_METHODS},
    "reap": Row(kind=FewerExperts, is_baseline=True),
    "svd-llm": Row(settings=preset_settings("paper")),
    **{name: Row(settings=preset_settings(name)) for name in PRESETS if name != "paper"},
}


def is_baseline(name: str) -> bool:
    """Whether a variant of this name is one that the paper compares itself with."""
    if name in VARIANTS:
        return VARIANTS[name].is_baseline
    return name.partition(",")[0] == ONE_BIT or find_system(name) is not None


def variants_of(
    names: Sequence[str],
    calibration: Mapping[str, Any],
    recover: Mapping[str, Any] | None = None,
    *,
    teacher: str,
    offline: bool = False,
) -> tuple[Variant, ...]:
    """The variants by name.

    A name is one of ``VARIANTS`` or a recipe file. ``NAME+TRAINING`` is the same model trained afterwards, as in
    ``svd-llm+sequential-lora`` or ``balanced+blockwise+distill``. ``NAME=MODEL`` is a model that somebody else made: a
    folder that ``from_pretrained`` loads, a hub id, or a GGUF file. A name of ``SIMULATED_SYSTEMS`` is the dense model
    in few bits; ``NAME+SYSTEM``, as in ``svd-llm+quip-2``, is a compressed model whose factors are in few bits.

    Args:
        calibration: settings of all recipes.
        recover: settings of all training; its device is that of the recipe by default.
        teacher: the dense model, for methods of training that take one.
        offline: never ask the hub.

    Raises:
        InputError: a name is not known, given twice, or its settings make no sense; names it.
    """
    variants = tuple(
        _foreign(name, offline) if "=" in name else _variant(name, calibration, recover, teacher) for name in names
    )
    for variant in variants:
        if [other.name for other in variants].count(variant.name) > 1:
            raise InputError(f"Method {variant.name!r} is given twice.")
    if recover is not None and not any(isinstance(variant, Trained | OneBit) for variant in variants):
        raise InputError(
            "Training settings are given, but no method is trained: write svd-llm+sequential-lora among the methods."
        )
    return variants


def _foreign(text: str, offline: bool) -> Foreign:
    name, source = (part.strip() for part in text.split("=", 1))
    if not name or not source:
        raise InputError(f"Method {text!r}: expected NAME=MODEL, as in pruned=models/pruned.")
    if name in (*VARIANTS, ONE_BIT, DENSE) or "+" in name or find_system(name) is not None:
        raise InputError(f"Method {text!r}: {name} is the name of another method. Choose another name for {source}.")
    return Foreign(name=name, source=source, offline=offline)


def _variant(name: str, calibration: Mapping[str, Any], recover: Mapping[str, Any] | None, teacher: str) -> Variant:
    base, *training = name.split("+")
    if (system := find_system(training[-1] if training else base)) is not None:
        return _quantised(name, system, calibration, recover, teacher)
    if name == ONE_BIT:
        return _one_bit(calibration, recover, teacher)
    if base in VARIANTS:
        variant = VARIANTS[base].variant(base, calibration)
    elif Path(base).suffix in (".yaml", ".yml", ".json"):
        variant = _of_recipe_file(base, calibration)
    else:
        raise InputError(_unknown(name, base, [*VARIANTS, *SIMULATED_SYSTEMS, *METHODS]))
    if not training:
        return variant
    if not isinstance(variant, Compressed | Pruned):
        raise InputError(f"Method {name}: {base} is made by a function, and only models made by svdllm can be trained.")
    recovery = _recovery(name, training, recover, teacher, variant.device)
    return Trained(name="+".join([variant.name, *training]), compressed=variant, recovery=recovery)


def _quantised(
    name: str, system: System, calibration: Mapping[str, Any], recover: Mapping[str, Any] | None, teacher: str
) -> Quantised:
    """The dense model by a system, or the factors of the model that is named before it."""
    compressed, recipe = None, make_recipe({**preset_settings("paper"), **calibration}, f"method {name}")
    if "+" in name:
        compressed = _variant(name.rpartition("+")[0], calibration, recover, teacher)
        if not isinstance(compressed, Compressed):
            raise InputError(
                f"Method {name}: {compressed.name} is not a model compressed by a recipe alone, and only the factors "
                f"of such a model are quantised here, as in svd-llm+{system.name}."
            )
    return Quantised(name=name, recipe=recipe, system=system, compressed=compressed)


def _one_bit(calibration: Mapping[str, Any], recover: Mapping[str, Any] | None, teacher: str) -> OneBit:
    """OneBit, by the settings of the training; its name says for how long it is trained."""
    recipe = make_recipe({**preset_settings("paper"), **calibration}, f"method {ONE_BIT}")
    settings = None if recover is None else {**DEFAULTS, **recover}
    recovery = _recovery(ONE_BIT, [METHOD], settings, teacher, recipe.device)
    schedule = recovery.schedule(METHOD)
    length = f"{schedule.epochs:g} epochs" if schedule.steps is None else f"{schedule.steps} steps"
    return OneBit(name=f"{ONE_BIT}, {length}", recipe=recipe, recovery=recovery)


def _of_recipe_file(path: str, calibration: Mapping[str, Any]) -> Compressed:
    """The variant of a recipe file, without the budget in it."""
    settings, name = load_settings(path), Path(path).stem
    if name in (*VARIANTS, DENSE):
        raise InputError(f"Recipe {path} would be called {name}, which is another method: rename the file.")
    settings = {key: value for key, value in settings.items() if key == "ranks" or key not in (*BUDGETS, *OF_A_BUDGET)}
    if settings.get("ranks") is not None:
        raise InputError(f"Recipe {path} has explicit ranks, which have no ratio: leave them out.")
    return Compressed(name=name, recipe=make_recipe({**settings, **calibration}, f"method {path}"))


def _recovery(name: str, training: list[str], recover: Mapping[str, Any] | None, teacher: str, device: str) -> Recovery:
    if unknown := [method for method in training if method not in METHODS]:
        raise InputError(_unknown(name, unknown[0], list(METHODS)))
    if recover is None or "data" not in recover:
        raise InputError(f"Method {name} needs data to learn from: --recover 'data: alpaca.json', or another source.")
    if "methods" in recover:
        raise InputError("--recover: write methods of training behind the method, as in svd-llm+sequential-lora.")
    taught = {"teacher": teacher} if any(METHODS[method].teacher != "unused" for method in training) else {}
    return make_recovery({"device": device, **taught, **recover, "methods": tuple(training)})


def _unknown(name: str, part: str, known: list[str]) -> str:
    return (
        f"Unknown method {name!r}{did_you_mean(part, known) or '.'} Known are {', '.join(VARIANTS)}, a recipe file "
        f"(.yaml), each of these with +{', +'.join(METHODS)} behind it, {', '.join(SIMULATED_SYSTEMS)} (in few bits, "
        "simulated; also behind a +), and NAME=MODEL for a model made elsewhere."
    )
