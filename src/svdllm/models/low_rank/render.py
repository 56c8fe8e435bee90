"""Renders the two code files of a checkpoint, which ``trust_remote_code=True`` runs where svdllm is not installed."""

from __future__ import annotations

import json
from importlib import resources

import transformers

from svdllm.models.low_rank.families import MODEL_TYPE_PREFIX, auto_classes, base_classes, class_stem, head_name

_CONFIG = """

class {stem}Config(LowRankConfigMixin, {base}):
    model_type = "{model_type}"
"""

_HEAD = """    low_rank_head = "{head}"
    low_rank_auto_classes = {autos}
"""

_MODELS = """

class {stem}Model(LowRankMixin, {model}):
    config_class = {stem}Config


class {stem}{head}(LowRankMixin, {causal_lm}):
    config_class = {stem}Config
"""


def render(base_model_type: str, modules: tuple[str, str]) -> dict[str, str]:
    """Renders ``configuration_*.py`` and ``modeling_*.py`` of a family: file name -> text, the same on every machine.

    Args:
        modules: the names of the two files, see ``LowRankConfigMixin.code_modules``.

    Raises:
        UnsupportedModelError: there is no such family.
    """
    base, stem = base_classes(base_model_type), class_stem(base_model_type)
    configuration, modeling = modules
    head, autos = head_name(base_model_type), [cls.__name__ for cls in auto_classes(base_model_type)]
    plain = autos == ["AutoModelForCausalLM"]
    config_text = _with_imports("lowrank_config.py", [_import_of(base.config)]) + _CONFIG.format(
        stem=stem, base=base.config.__name__, model_type=MODEL_TYPE_PREFIX + base_model_type
    )
    config_text += "" if plain else _HEAD.format(head=head, autos=json.dumps(autos))
    imports = sorted({_import_of(base.model), _import_of(base.causal_lm)})
    modeling_text = _with_imports(
        "lowrank.py", [*imports, f"from .{configuration} import {stem}Config"]
    ) + _MODELS.format(stem=stem, model=base.model.__name__, head=head, causal_lm=base.causal_lm.__name__)
    return {f"{configuration}.py": config_text, f"{modeling}.py": modeling_text}


def _import_of(cls: type) -> str:
    public = getattr(transformers, cls.__name__, None) is cls
    return f"from {'transformers' if public else cls.__module__} import {cls.__name__}"


def _with_imports(source: str, imports: list[str]) -> str:
    """Reads one of our files and inserts ``imports`` behind its own imports."""
    text = resources.files("svdllm.models.low_rank").joinpath(source).read_text(encoding="utf-8")
    lines = text.splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    return "\n".join([*lines[: last + 1], *imports, *lines[last + 1 :]]) + "\n"
