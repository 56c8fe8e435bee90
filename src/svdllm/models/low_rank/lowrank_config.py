"""The config of a low-rank model: the base family's config with the entry ``svdllm``.

This file is copied into every checkpoint, so it imports nothing but transformers and the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _Config
else:
    _Config = object

FORMAT_VERSION = 2
# What the entry of a form must have. Every form may have in_features and out_features; narrow has one of them or both.
FORM_FIELDS: dict[str, tuple[str, ...]] = {
    "pair": ("rank",),
    "packed": ("rank", "side"),
    "narrow": (),
    "corrected": ("rank",),
}
# Names in transformers 4, by model type, where they differ from other families; None where the field is refused.
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_PHI3 = {"rope_type": "type", "original_max_position_embeddings": None}
LEGACY_ROPE_NAMES: dict[str, Mapping[str, str | None]] = {
    "gpt_neox": _GPT_NEOX,
    "gpt_neox_japanese": _GPT_NEOX,
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
    "olmo": {"rope_type": "type"},
    "olmo2": {"rope_type": "type"},
    "phi3": _PHI3,
    "phi4_multimodal": _PHI3,
}


def check_svdllm(settings: Any) -> dict[str, Any] | None:
    """Returns ``settings``, the ``svdllm`` entry of a config, if this code can read it.

    Raises:
        ValueError: the entry is not a mapping, its format version is unknown, a linear has a form that this code does
            not know or that lacks a size, or a linear cannot have the first factor that it is said to share.
    """
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"config.svdllm: expected a mapping, found {type(settings).__name__}.")
    version = settings.get("format_version")
    if version == 1:
        _check_ranks(settings.get("ranks"))
    elif version == FORMAT_VERSION:
        _check_forms(settings.get("forms"))
    else:
        raise ValueError(
            f"config.svdllm: this code reads checkpoint formats 1 to {FORMAT_VERSION}, found "
            f"format_version={version!r}. Upgrade with `pip install -U svdllm`, or load with the version of svdllm "
            "that wrote the checkpoint."
        )
    _check_shared_factors(settings.get("shared_factors", {}), forms_of(settings))
    for key, (is_valid, expected) in REMOVED_PARTS.items():
        _check_removed(key, settings.get(key, {}), is_valid, expected)
    _check_embeddings(settings.get("embeddings", {}))
    return settings


def _check_removed(key: str, entries: Any, is_valid: Callable[[Any], bool], expected: str) -> None:
    """Raises ValueError unless an entry of a pruned model is a mapping from names to valid values."""
    if not isinstance(entries, dict):
        raise ValueError(f"config.svdllm.{key}: expected a mapping from names, found {type(entries).__name__}.")
    if bad := {name: value for name, value in entries.items() if not is_valid(value)}:
        raise ValueError(f"config.svdllm.{key}: expected {expected}, found {bad}.")


def forms_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Linear -> entry of format version 2; the ranks of version 1 are those of pairs."""
    if settings.get("format_version") == 1:
        return {name: {"form": "pair", "rank": rank} for name, rank in settings["ranks"].items()}
    return settings["forms"]


def _check_ranks(ranks: Any) -> None:
    if not isinstance(ranks, dict):
        raise ValueError("config.svdllm.ranks: expected a mapping from module names to ranks.")
    bad = {name: rank for name, rank in ranks.items() if not _is_positive_int(rank)}
    if bad:
        raise ValueError(f"config.svdllm.ranks: expected positive integers, found {bad}.")


def _check_forms(forms: Any) -> None:
    if not isinstance(forms, dict):
        raise ValueError("config.svdllm.forms: expected a mapping from module names to forms.")
    if problems := [f"{name}: {why}" for name, entry in forms.items() if (why := _wrong_with(entry))]:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"config.svdllm.forms: {'; '.join(problems[:8])}{more}.")


def _wrong_with(entry: Any) -> str | None:
    """Says what is wrong with the entry of a linear in ``forms``, or None."""
    fields = FORM_FIELDS.get(str(entry.get("form"))) if isinstance(entry, dict) else None
    if fields is None:
        return f"expected a form of {', '.join(FORM_FIELDS)}, found {entry}"
    required, sizes = {"form", *fields}, {"rank", "in_features", "out_features"} & set(entry)
    unknown = sorted(set(entry) - required - {"in_features", "out_features"})
    if missing := sorted(required - set(entry)):
        return f"{entry['form']} lacks {', '.join(missing)}"
    if unknown:
        return f"{entry['form']} has no {', '.join(unknown)}"
    if not sizes:
        return f"{entry['form']} lacks in_features or out_features"
    if bad := {key: entry[key] for key in sorted(sizes) if not _is_positive_int(entry[key])}:
        return f"expected positive integers, found {bad}"
    if entry.get("side", "rows") not in ("rows", "columns"):
        return f"expected the side rows or columns, found {entry['side']!r}"
    return None


def _check_shared_factors(shared: Any, forms: Mapping[str, Mapping[str, Any]]) -> None:
    if not isinstance(shared, dict):
        raise ValueError("config.svdllm.shared_factors: expected a mapping from module names to module names.")
    for name, first in shared.items():
        entries = [_first_factor(forms[linear]) if linear in forms else None for linear in (name, first)]
        if entries[0] is None or entries[0] != entries[1] or first in shared:
            raise ValueError(
                f"config.svdllm.shared_factors: {name} cannot have the first factor of {first}: expected two pairs, or "
                "two linears packed by columns, with the same rank, the second with a first factor of its own."
            )


def _check_embeddings(embeddings: Any) -> None:
    fields = {"bits", "group_size"}
    for name, entry in embeddings.items() if isinstance(embeddings, dict) else [("embeddings", embeddings)]:
        if not isinstance(entry, dict) or set(entry) != fields or not all(map(_is_positive_int, entry.values())):
            raise ValueError(f"config.svdllm.embeddings: expected bits and group_size of {name}, found {entry}.")
        if entry["bits"] > 8:
            raise ValueError(f"config.svdllm.embeddings: expected at most 8 bits of {name}, found {entry['bits']}.")


def _first_factor(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """What must agree where a first factor is shared; None for a form whose first factor cannot be."""
    if entry["form"] in ("narrow", "corrected") or entry.get("side") == "rows":
        return None
    return {key: entry.get(key) for key in ("form", "rank", "in_features")}


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_sliced_norm(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(_is_positive_int(entry.get(key)) for key in ("width", "full_width"))
        and isinstance(entry.get("eps"), float)
        and isinstance(entry.get("branch", ""), str)
    )


# What a pruned model has beside forms: entry -> whether a value is valid, and what is expected.
REMOVED_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "counts": (_is_positive_int, "positive integers"),
    "dropped": (lambda value: value == 0 or _is_positive_int(value), "numbers of outputs"),
    "embedding_widths": (_is_positive_int, "positive integers"),
    "norms": (_is_sliced_norm, "objects with width, full_width, eps and branch"),
}


def low_rank_tp_plan(base_plan: dict[str, str], pairs: Iterable[str]) -> dict[str, str]:
    """Makes the rules of tensor parallelism for a model whose linears in ``pairs`` are pairs of factors.

    A column-parallel ``W = U V`` shards the rows of ``U`` and replicates ``V``. A row-parallel one shards the columns
    of ``V`` and replicates ``U``, so that the all-reduce is of a rank-sized vector. Readers that take the first
    matching prefix (vLLM, SGLang) need this order: sharded factors, replicated factors, rules of the base family.
    """
    sharded, replicated = {}, {}
    for rule, style in base_plan.items():
        pattern = re.compile(r"(?:^|\.)" + r"\d+".join(map(re.escape, rule.split("*"))) + "$")
        if not any(pattern.search(name) for name in pairs):
            continue
        for factor, factor_style in factor_styles(style).items():
            rules = replicated if factor_style == "replicate" else sharded
            rules[f"{rule}.{factor}"] = factor_style
    return {**sharded, **replicated, **base_plan}


def factor_styles(style: str) -> dict[str, str]:
    """The styles of the factors of a linear of this style; both get one that is neither by row nor by column."""
    if "rowwise" in style:
        return {"svd_v": style, "svd_u": "replicate"}
    if "colwise" in style or style == "mla_kv_a_proj":
        return {"svd_u": style, "svd_v": "replicate"}
    return {"svd_u": style, "svd_v": style}


def legacy_rope_fields(rope: dict[str, Any], base_model_type: str | None) -> dict[str, Any]:
    """The fields from which readers older than ``rope_parameters``, such as transformers 4, take the same numbers.

    Such readers know one set of numbers for all layers, and another theta for layers with a sliding window. Anything
    else has no fields.
    """
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(full, dict) and isinstance(sliding, dict):
        if set(sliding) - {"rope_theta", "partial_rotary_factor"} != {"rope_type"} or sliding["rope_type"] != "default":
            return {}
        if full.get("partial_rotary_factor") != sliding.get("partial_rotary_factor"):
            return {}
        fields = _legacy_fields(full) | {"rope_local_base_freq": sliding.get("rope_theta")}
    elif any(isinstance(value, dict) for value in rope.values()):
        return {}
    else:
        fields = _legacy_fields(rope)
    names = LEGACY_ROPE_NAMES.get(base_model_type or "", {})
    if fields["rope_scaling"]:
        fields["rope_scaling"] = _renamed(fields["rope_scaling"], names)
    return _renamed(fields, names)


def _legacy_fields(rope: dict[str, Any]) -> dict[str, Any]:
    fields = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    scaling = {key: value for key, value in rope.items() if key not in (*fields, "type")}
    length = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") == "longrope" and length is not None:
        fields["original_max_position_embeddings"] = length  # read for this type only
    # None, not a missing field: some families are scaled by default.
    return fields | {"rope_scaling": None if scaling in ({}, {"rope_type": "default"}) else scaling}


def _renamed(fields: dict[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    return {name: value for key, value in fields.items() if (name := names.get(key, key)) is not None}


class LowRankConfigMixin(_Config):
    """Adds the ``svdllm`` entry to the config class of a family: ``class C(LowRankConfigMixin, LlamaConfig)``.

    ``svdllm`` has ``format_version``, ``base_model_type``, ``forms`` (names as in the causal LM's ``named_modules``),
    ``shared_factors`` where linears use the first factor of others, and whatever else the writer recorded. It is
    checked when a config is made, and kept unchanged. Names of linears are those of the whole, in a wrapper too.

    That of a pruned model may have ``counts`` (integers of modules that count heads or channels), ``dropped`` (removed
    attentions and MLPs, with the number of their outputs), ``embedding_widths`` and ``norms`` (those of a residual with
    fewer features).

    low_rank_head: the end of the name of the class with a head.
    low_rank_auto_classes: the auto classes that find it.
    """

    low_rank_head = "ForCausalLM"
    low_rank_auto_classes = ("AutoModelForCausalLM",)

    svdllm: dict[str, Any] | None = None  # a plain attribute: this class is no dataclass

    def __post_init__(self, svdllm: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if getattr(self, "rope_parameters", None):
            kwargs.pop("rope_scaling", None)  # for older readers; the base class would prefer it
        super().__post_init__(**kwargs)
        self.svdllm = check_svdllm(svdllm)
        if plan := self.base_model_tp_plan:
            pairs = [name for name, entry in self.svdllm_forms.items() if entry["form"] == "pair"]
            plan = low_rank_tp_plan(plan, pairs)
            self.base_model_tp_plan = plan  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def svdllm_forms(self) -> dict[str, dict[str, Any]]:
        """Linear -> entry of format version 2, whatever the version of the checkpoint."""
        return forms_of(self.svdllm) if self.svdllm else {}

    @staticmethod
    def factor_styles(style: str) -> dict[str, str]:
        """The function of this name, for the models, whose file does not import this one."""
        return factor_styles(style)

    @classmethod
    def code_modules(cls) -> tuple[str, str]:
        """Names, without ``.py``, of the code files of a checkpoint: for the config and for the models."""
        stem = re.sub(r"\W", "_", cls.model_type)
        return f"configuration_{stem}", f"modeling_{stem}"

    @classmethod
    def full_auto_map(cls) -> dict[str, str]:
        """Maps all auto classes: serving engines need ``AutoModel``, transformers names only what it saves."""
        configuration, modeling = cls.code_modules()
        stem = cls.__name__.removesuffix("Config")
        return {
            "AutoConfig": f"{configuration}.{stem}Config",
            "AutoModel": f"{modeling}.{stem}Model",
            **dict.fromkeys(cls.low_rank_auto_classes, f"{modeling}.{stem}{cls.low_rank_head}"),
        }

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("base_model_tp_plan", None)  # follows from the forms
        output["auto_map"] = self.full_auto_map()
        if isinstance(rope := output.get("rope_parameters"), dict):
            output.update(legacy_rope_fields(rope, (self.svdllm or {}).get("base_model_type")))
        return output
