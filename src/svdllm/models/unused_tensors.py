"""Finds tensors in a model's files that the model does not use: its config does not ask for them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from transformers import PreTrainedModel

from svdllm.models.experts import known_tensors

SHOWN = 6
# Tables in the files of older models, which models now compute.
_TABLES = re.compile(r"(^|\.)((original_)?inv_freq|position_ids)$")


class UnusedTensorsWarning(UserWarning):
    """Some tensors in the files of a model are not used."""


@dataclass(frozen=True, kw_only=True)
class UnusedTensors:
    """Unused tensors of a model.

    tensors, params: number of tensors, and of values in them.
    ignored: number of tensors that transformers ignores on purpose.
    names: short forms, see ``grouped_names``.
    """

    tensors: int
    params: int
    ignored: int
    names: list[str]

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], lost: Sequence[str], used: Iterable[str], ignored: int = 0
    ) -> UnusedTensors | None:
        """Describes the ``lost`` tensors among all (``shapes``, by the names in the files); None if nothing is lost."""
        params = sum(prod(shapes[name]) for name in lost)
        names = grouped_names(lost, used)
        return cls(tensors=len(lost), params=params, ignored=ignored, names=names) if lost else None

    @property
    def text(self) -> str:
        """Sums up the number of tensors and the first names."""
        more = len(self.names) - SHOWN
        names = ", ".join(self.names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        return (
            f"{self.tensors:,} unused tensor{'s' if self.tensors > 1 else ''} of {self.params:,} parameters ({names})"
        )


def unused_tensors(
    shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, str], model: PreTrainedModel
) -> UnusedTensors | None:
    """Counts and names the tensors in a model's files that it does not use; None if it uses all.

    transformers ignores some on purpose (``_keys_to_ignore_on_load_unexpected``). Masks and tables that a module of the
    model computes are not counted. Modules that the model leaves out are: layers for drafting (MTP), an image encoder.

    Args:
        shapes: of all tensors, by the names in the files.
        places: name in the files -> name in the model.
    """
    state = known_tensors(model)
    lost = [name for name in shapes if places[name] not in state and not _TABLES.search(name)]
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    ignored = [name for name in lost if any(re.search(pattern, places[name]) for pattern in patterns)]
    modules = {name for name, _ in model.named_modules()}
    modules |= {name.removeprefix(f"{model.base_model_prefix}.") for name in modules}
    computed = {name for name in ignored if places[name].rpartition(".")[0] in modules}
    used = [name for name in shapes if places[name] in state]
    lost = [name for name in lost if name not in computed]
    return UnusedTensors.of(shapes, lost, used, ignored=len(ignored) - len(computed))


def warn_of_unused(model: str, unused: UnusedTensors | None) -> None:
    """Warns of tensors in a model's files that are not read; of the same ones once."""
    if unused is None:
        return
    advice = (
        "transformers ignores them on purpose."
        if unused.ignored == unused.tensors
        else "transformers leaves them out as well. If the model needs them, correct its config.json (attention_bias, "
        "num_hidden_layers, ...)."
    )
    warnings.warn(
        f"{model} has {unused.text}, which its config does not ask for. They are left out; {advice}",
        UnusedTensorsWarning,
        stacklevel=1,  # one place for all callers: Python shows the same text of the same place once
    )


def grouped_names(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Short forms of dotted names: ``layers.2.*`` for all of a module, ``layers.0-31.q_proj.bias`` for names alike.

    A module is named as a whole if none of ``others`` is in it.
    """
    taken = {head for name in others for head in _heads(name)}
    wholes: dict[str, None] = {}
    for name in names:
        top = next((head for head in _heads(name) if head not in taken), name)
        wholes[top if top == name else f"{top}.*"] = None
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for whole in wholes:
        parts = tuple(whole.split("."))
        alike.setdefault(tuple("" if part.isdecimal() else part for part in parts), []).append(parts)
    return [".".join(map(_joined, zip(*group, strict=True))) for group in alike.values()]


def _heads(name: str) -> list[str]:
    """The beginnings of a dotted name up to each dot, the shortest first, and the name itself."""
    return [*(name[: dot.start()] for dot in re.finditer(r"\.", name)), name]


def _joined(parts: tuple[str, ...]) -> str:
    """Joins the parts that similar names have at one place: the common word, or the numbers as ``0-2,5``."""
    if not parts[0].isdecimal():
        return parts[0]
    runs: list[list[int]] = []
    for number in sorted(set(map(int, parts))):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
