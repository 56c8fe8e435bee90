"""Tensors in a model's files that the model has no place for: its config does not ask for them, and loading drops them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from transformers import PreTrainedModel

SHOWN = 6
# Tables that files of older models hold, and that models compute by themselves now.
_TABLES = re.compile(r"(^|\.)((original_)?inv_freq|position_ids)$")


class UnusedTensorsWarning(UserWarning):
    """A model is read without some of the tensors in its files."""


@dataclass(frozen=True, kw_only=True)
class UnusedTensors:
    """How many there are, the values in them, and their names: those alike as one, with ranges for numbers."""

    tensors: int
    params: int
    ignored: int  # of the tensors: those that transformers ignores on purpose
    names: list[str]

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], lost: Sequence[str], used: Iterable[str], ignored: int = 0
    ) -> UnusedTensors | None:
        """By the names in the files; None if nothing is lost."""
        params = sum(prod(shapes[name]) for name in lost)
        names = grouped_names(lost, used)
        return cls(tensors=len(lost), params=params, ignored=ignored, names=names) if lost else None

    @property
    def text(self) -> str:
        """How many there are, and the first of many names."""
        more = len(self.names) - SHOWN
        names = ", ".join(self.names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        return (
            f"{self.tensors:,} unused tensor{'s' if self.tensors > 1 else ''} of {self.params:,} parameters ({names})"
        )


def unused_tensors(
    shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, str], model: PreTrainedModel
) -> UnusedTensors | None:
    """Counts and names what a model does not use of the tensors in its files; None if nothing is lost.

    transformers ignores some on purpose (``_keys_to_ignore_on_load_unexpected``). Masks and tables that a module of the
    model computes by itself are no loss; modules that the model leaves out are, such as layers for drafting (MTP) or an
    image encoder.

    Args:
        shapes: those of all tensors, by the names in the files.
        places: the names that the model has for them, or would have.
    """
    state = model.state_dict()
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
    """A name's beginnings up to every dot, the shortest first, and the name."""
    return [*(name[: dot.start()] for dot in re.finditer(r"\.", name)), name]


def _joined(parts: tuple[str, ...]) -> str:
    """One text for what names alike have at one place: a word, or their numbers as ``0-2,5``."""
    if not parts[0].isdecimal():
        return parts[0]
    runs: list[list[int]] = []
    for number in sorted(set(map(int, parts))):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
