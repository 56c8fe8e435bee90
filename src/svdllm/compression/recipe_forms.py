"""The part of the recipe that chooses forms, with the settings that some forms exclude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator, model_validator
from typing_extensions import Self

from svdllm.common.settings import setting
from svdllm.compression.after_analysis import AfterAnalysis
from svdllm.compression.forms import FORMS, bits_in, in_bits
from svdllm.compression.forms.runtimes import DEFAULT_RUNTIME, RUNTIMES
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.recipe_parts import Budget, MethodChoice, rows_of

# Ends an error about few bits.
IN_SOURCE_DTYPE = ", or keep the source's dtype with --forms pair,packed,narrow"


class FormsChoice(Budget, MethodChoice):
    """The rows of ``FORMS``, and what not every form can do."""

    forms: AfterAnalysis[tuple[str, ...] | None] = setting(
        None,
        f"What may take the place of dense linears: {rows_of(FORMS)}. What is no smaller or loses more than another "
        "stays dense in any case.",
        panel="Allocation",
        metavar="|".join(FORMS),
        shown_default="all that the allocation and the method can use",
        reader="names",
    )

    runtime: AfterAnalysis[str | None] = setting(
        None,
        f"What the model is for; it gets every form that this can load, few bits too: {rows_of(RUNTIMES)}.",
        panel="Allocation",
        metavar="|".join(RUNTIMES),
        shown_default=f"{DEFAULT_RUNTIME} with --target-size, without --forms and --factor-bits; else none: forms in "
        "the source's dtype",
    )
    elastic: AfterAnalysis[bool] = setting(
        False,
        "Also write what every smaller size needs: `svdllm slice` then makes it in seconds, without text.",
        panel="Recipe",
    )
    bias_correction: bool = setting(
        False,
        "Factor centred inputs, and give every low-rank linear a bias that corrects its mean output.",
        panel="Method",
    )

    @classmethod
    def default_runtime(cls, settings: Mapping[str, Any]) -> str | None:
        """The runtime where settings name none: ``DEFAULT_RUNTIME`` if few bits may serve a budget of bytes.

        None with another budget, with forms or ``factor_bits`` named, and by an allocation that chooses no few bits.
        """
        row = ALLOCATIONS.get(str(settings.get("allocation", cls.model_fields["allocation"].default)))
        if row is None or settings.get("target_size") is None:
            return None
        named = any(settings.get(name) is not None for name in ("forms", "factor_bits", "ranks"))
        return None if named or not bits_in(row.other_forms) else DEFAULT_RUNTIME

    @field_validator("forms")
    @classmethod
    def _known_form(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in value or () if name not in FORMS]
        if unknown:
            raise ValueError(f"unknown form {unknown[0]!r}; known are {', '.join(FORMS)}")
        if value is not None and not any(FORMS[name].curve for name in value):
            raise ValueError(
                f"forms {', '.join(value) or '(none)'} leave every linear as it is; name at least one of "
                f"{', '.join(name for name, row in FORMS.items() if row.curve)}"
            )
        return value

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, value: str | None) -> str | None:
        if value is not None and value not in RUNTIMES:
            raise ValueError(f"unknown runtime {value!r}; known are {', '.join(RUNTIMES)}")
        return value

    @model_validator(mode="after")
    def _fits_the_forms(self) -> Self:
        if self.forms is not None and self.ranks is not None:
            raise ValueError("forms does nothing to explicit ranks; name the form there, as in {packed: 96}")
        if self.runtime is not None and self.ranks is None and not self.used_forms:
            raise ValueError(
                f"runtime {self.runtime} loads {', '.join(RUNTIMES[self.runtime].forms)}, which save bytes and not "
                "parameters; give target_size as the budget"
            )
        for name in self.analysed_forms if self.ranks is not None else self.forms or ():
            if (reason := self._why_not(name)) is not None:
                raise ValueError(f"form {name} cannot be used: {reason}")
        return self

    @property
    def joins(self) -> bool:
        """Whether linears that read the same tensor get one form, as the runtime needs them."""
        return self.runtime is not None and RUNTIMES[self.runtime].joins

    @property
    def stores_vocabulary(self) -> bool:
        """Whether embedding and head may be in few bits."""
        loads = self.runtime is None or RUNTIMES[self.runtime].vocabulary
        return loads and bool(bits_in(self.analysed_forms))

    @property
    def truncates(self) -> bool:
        """Whether linears may be truncated to a rank."""
        return any(FORMS[name].curve == "truncation" for name in self.analysed_forms)

    def _why_not(self, form: str) -> str | None:
        """Why the recipe cannot use a form; None if it can."""
        row, allocation = FORMS[form], ALLOCATIONS[self.allocation]
        if self.ranks is None and row.curve and form not in (*allocation.forms, *allocation.other_forms):
            use = " or ".join(n for n, other in ALLOCATIONS.items() if form in (*other.forms, *other.other_forms))
            return f"allocation {self.allocation} does not choose it; use allocation {use}"
        if self.runtime is not None and row.curve and form not in RUNTIMES[self.runtime].forms:
            can = ", ".join(RUNTIMES[self.runtime].forms)
            return f"{self.runtime} cannot load it; it loads {can}"
        if in_bits(row) and self.target_size is None and self.ranks is None:
            return "it saves bytes and not parameters; give target_size as the budget"
        if in_bits(row) and self.factor_bits is not None:
            return "factor_bits is for a model that `svdllm quantize` stores in few bits as a whole"
        if row.needs_gram and not METHODS[self.method].has_gram:
            return f"it is fitted to the Gram of the inputs, and method {self.method} has none"
        if self.bias_correction and row.curve and not row.adds_bias:
            return "bias_correction gives every compressed linear a bias, which this form has no place for"
        if self.elastic and row.curve and not row.nested:
            return "the sizes of an elastic checkpoint are parts of each other; `svdllm slice --forms` packs its pairs"
        return None

    @property
    def used_forms(self) -> tuple[str, ...]:
        """The forms that may take the place of dense linears: those named, or all that can."""
        if self.forms is not None:
            return self.forms
        row = ALLOCATIONS[self.allocation]
        names = row.forms if self.runtime is None else (*row.forms, *row.other_forms)
        return tuple(name for name in names if self._why_not(name) is None)

    @property
    def analysed_forms(self) -> tuple[str, ...]:
        """The forms that the analysis prepares: those that may be used, or that explicit ranks name."""
        named = (next(iter(wanted)) for wanted in (self.ranks or {}).values() if isinstance(wanted, dict))
        return self.used_forms if self.ranks is None else ("pair", *named)
