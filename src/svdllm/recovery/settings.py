"""The settings of a recovery: complete, serialisable, stored in the checkpoint that the run makes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, PrivateAttr, ValidationError, create_model, model_validator

from svdllm.common.errors import InputError
from svdllm.common.settings import Panel, problems_of, setting
from svdllm.recovery.methods import METHODS
from svdllm.recovery.training_settings import Schedule, TrainingSettings

if TYPE_CHECKING:
    SettingsOfMethods = TrainingSettings
else:  # the shared settings and each method's own
    _OWN = dict.fromkeys(method.Settings for method in METHODS.values() if method.Settings is not TrainingSettings)
    SettingsOfMethods = create_model("SettingsOfMethods", __base__=tuple(_OWN))


def _known(method: str) -> str:
    """Raises ValueError if there is no such method."""
    if method not in METHODS:
        *names, last = map(repr, METHODS)
        raise ValueError(f"Input should be {', '.join(names)} or {last}")
    return method


def users_of(setting: str) -> list[str]:
    """The methods that look at a setting, by name."""
    own = [method.name for method in METHODS.values() if setting in _own_settings(method.Settings)]
    return own or [method.name for method in METHODS.values() if setting not in method.unused]


def _own_settings(settings: type[TrainingSettings]) -> set[str]:
    return set(settings.model_fields) - set(TrainingSettings.model_fields)


def _of_schedule(name: str, description: str, *, panel: Panel, **constraints: Any) -> Any:
    """A setting with a default for each method; the help shows the first method's, and those that differ from it."""
    defaults = {method.name: getattr(method.defaults, name) for method in METHODS.values()}
    first, *others = defaults
    shown = [_number(defaults[first])] if defaults[first] is not None else []
    shown += [
        f"{other} {_number(defaults[other])}" for other in others if defaults[other] not in (defaults[first], None)
    ]
    return setting(None, description, panel=panel, shown_default=", ".join(shown), **constraints)


def _number(value: float) -> str:
    """``1.5e-4`` for small numbers, ``256`` for others."""
    if value >= 0.01:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


class Recovery(SettingsOfMethods):
    """Settings of a recovery; keyword-only, frozen, unknown keys are errors. None is the method's own default."""

    _context: int | None = PrivateAttr(None)

    methods: tuple[Annotated[str, AfterValidator(_known)], ...] = setting(
        ("sequential-lora",),
        f"{'; '.join(f'{method.name}: {method.summary}' for method in METHODS.values())}. Several run one after the "
        "other, as in blockwise,distill.",
        panel="Training",
        flag="--method",
        reader="names",
        min_length=1,
    )
    lr: float | None = _of_schedule("lr", "Highest learning rate.", panel="Training", gt=0)
    epochs: float | None = _of_schedule(
        "epochs", "Passes over the examples, where steps are not given.", panel="Training", gt=0
    )
    steps: int | None = _of_schedule(
        "steps", "Optimizer steps of each stage, instead of epochs.", panel="Training", ge=1
    )
    batch: int | None = _of_schedule("batch", "Sequences of one step.", panel="Training", ge=1)
    seqlen: int | None = _of_schedule(
        "seqlen", "Longest sequence, in tokens; by default at most the model's context.", panel="Data", ge=2
    )

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> Recovery:
        for name in sorted(self.given - {"methods"}):
            users = users_of(name)
            if not set(users) & set(self.methods):
                raise ValueError(f"{name} does nothing to {', '.join(self.methods)}: it is for {', '.join(users)}")
        for name in ("eval_samples", "eval_steps"):
            if name in self.given and self.eval_data is None:
                raise ValueError(f"{name} needs eval_data: the held-out examples or text")
        if self.steps is not None and self._epochs_decide:
            raise ValueError("steps and epochs are given; steps alone decide how long it trains, give one of them")
        for method in self.methods:
            epochs = self.schedule(method).epochs
            if METHODS[method].whole_epochs and epochs is not None and epochs != int(epochs):
                raise ValueError(f"epochs is {epochs}; {method} makes whole passes over its windows")
        return self

    @property
    def _epochs_decide(self) -> bool:
        """Whether epochs were given, and not only for methods that do not count steps."""
        return self.epochs is not None and set(self.methods) <= set(users_of("steps"))

    def schedule(self, method: str) -> Schedule:
        """The schedule of a method: the settings that were given, and the method's own defaults for the others."""
        schedule = METHODS[method].defaults.within(self._context)
        if self._epochs_decide:
            schedule = replace(schedule, steps=None)
        settings = {field.name: getattr(self, field.name) for field in fields(Schedule)}
        return replace(schedule, **{name: value for name, value in settings.items() if value is not None})

    def within(self, context: int | None) -> Recovery:
        """The same settings with defaults that keep to the context of a model. What was given stays as it is."""
        bounded = self.model_copy()
        bounded._context = context
        return bounded


def make_recovery(settings: dict[str, Any]) -> Recovery:
    """A validated recovery.

    Raises:
        InputError: names each setting that is wrong, and what was expected.
    """
    try:
        return Recovery(**settings)
    except ValidationError as error:
        raise InputError(f"Recovery: {problems_of(error)}") from error
