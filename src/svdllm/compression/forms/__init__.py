"""The table of forms: what may take the place of a dense matrix.

A new one is a file beside this one and a row.
"""

from collections.abc import Collection, Iterable

from svdllm.compression.forms.bits import CORRECTED, FACTORS_IN_BITS, INTEGERS
from svdllm.compression.forms.dense import DENSE
from svdllm.compression.forms.narrow import NARROW
from svdllm.compression.forms.packed import PACKED
from svdllm.compression.forms.pair import PAIR
from svdllm.compression.forms.rows import Fitted, Form
from svdllm.models.chosen import Chosen
from svdllm.models.structure import Target

FORMS: dict[str, Form] = {
    row.name: row for row in (DENSE, PAIR, PACKED, NARROW, *INTEGERS, *FACTORS_IN_BITS, *CORRECTED)
}


def most_rank(target: Target, forms: Collection[str]) -> int:
    """The largest rank that some forms can have for a target; 0 if they have none."""
    rows = [FORMS[name] for name in forms if FORMS[name].exact_rank is not None]
    return max((sizes[-1] for row in rows if (sizes := row.sizes(target, 1))), default=0)


def factors_of(target: Target, forms: Collection[str]) -> Form:
    """The form of a target that gets a rank: packed where that may be used and the target can have it, else a pair."""
    return PACKED if "packed" in forms and (PACKED.sizes(target, 1) or "pair" not in forms) else PAIR


def corrected_bits(forms: Iterable[str]) -> list[int]:
    """The numbers of bits of some forms that a correction goes with, descending."""
    bases = (FORMS[name].base for name in forms if FORMS[name].curve == "correction")
    return sorted({base.bits for base in bases if base is not None and base.bits is not None}, reverse=True)


def in_bits(form: Form) -> bool:
    """Whether some weights of a form have fewer bits than the source's."""
    return (form.bits or form.factor_bits) is not None


def in_few_bits(chosen: Chosen | None) -> bool:
    """Whether some weights of a target have fewer bits than the source's."""
    return chosen is not None and in_bits(FORMS[chosen.form])


def bits_of(chosen: Chosen | None) -> int | None:
    """The bits of a weight of a target; None where they are those of the source."""
    return None if chosen is None else FORMS[chosen.form].bits


def bits_in(forms: Iterable[str]) -> list[int]:
    """The numbers of bits that matrices have in some forms, with corrections or without, descending."""
    forms = list(forms)
    alone = {bits for name in forms if (bits := FORMS[name].bits) is not None}
    return sorted(alone.union(corrected_bits(forms)), reverse=True)


def rank_of(chosen: Chosen | None) -> int | None:
    """The rank of a target; None where it stays dense, or its MLP is narrowed."""
    return None if chosen is None or FORMS[chosen.form].exact_rank is None else chosen.size


__all__ = [
    "FORMS",
    "Fitted",
    "Form",
    "bits_in",
    "bits_of",
    "corrected_bits",
    "factors_of",
    "in_bits",
    "in_few_bits",
    "most_rank",
    "rank_of",
]
