"""Checks rows of local files for the paper's eight tasks, and turns them into the columns of the hub.

Each class is a format. Its fields are the columns, with types and limits, and ``hub`` makes the row that the harness
expects. Other columns are left out.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    def hub(self) -> dict[str, Any]:
        return self.model_dump()

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns in the file."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def required(cls) -> set[str]:
        return {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}


class Choices(Row):
    text: list[str] = Field(min_length=2)
    label: list[str]

    @model_validator(mode="after")
    def _one_label_each(self) -> Choices:
        if len(self.text) != len(self.label):
            raise ValueError(f"expected as many labels as texts, found {len(self.label)} and {len(self.text)}")
        return self


class ArcEasy(Row):
    question: str
    choices: Choices
    answerKey: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> ArcEasy:
        _require_member(self.answerKey, self.choices.label)
        return self


class OpenBookQA(Row):
    question_stem: str
    choices: Choices
    answerKey: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> OpenBookQA:
        _require_member(self.answerKey.lstrip(), self.choices.label)
        return self


class Choice(Row):
    text: str
    label: str


class Question(Row):
    stem: str
    choices: list[Choice] = Field(min_length=2)


class OpenBookQAOriginal(Row):
    """The format of AllenAI's own files."""

    question: Question
    answerKey: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> OpenBookQAOriginal:
        _require_member(self.answerKey.lstrip(), [choice.label for choice in self.question.choices])
        return self

    def hub(self) -> dict[str, Any]:
        choices = self.question.choices
        return {
            "question_stem": self.question.stem,
            "choices": {"text": [choice.text for choice in choices], "label": [choice.label for choice in choices]},
            "answerKey": self.answerKey,
        }


class Winogrande(Row):
    sentence: str
    option1: str
    option2: str
    answer: Literal["1", "2"]

    @field_validator("sentence")
    @classmethod
    def _has_a_gap(cls, sentence: str) -> str:
        if "_" not in sentence:
            raise ValueError("expected a sentence with a gap '_'")
        return sentence


class HellaSwag(Row):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str] = Field(min_length=2)
    label: int | str

    @model_validator(mode="after")
    def _label_is_an_ending(self) -> HellaSwag:
        if str(self.label) not in {str(index) for index in range(len(self.endings))}:
            raise ValueError(f"expected a label from 0 to {len(self.endings) - 1}, found {self.label!r}")
        return self

    def hub(self) -> dict[str, Any]:
        return self.model_dump() | {"label": str(self.label)}


class Piqa(Row):
    goal: str
    sol1: str
    sol2: str
    label: Literal[0, 1, "0", "1"]

    def hub(self) -> dict[str, Any]:
        return self.model_dump() | {"label": int(self.label)}


class MathQA(Row):
    Problem: str
    options: str
    correct: Literal["a", "b", "c", "d", "e"]


class TruthfulQA(Row):
    question: str
    correct_answers: list[str]
    incorrect_answers: list[str]

    @field_validator("correct_answers", "incorrect_answers")
    @classmethod
    def _has_an_answer(cls, answers: list[str]) -> list[str]:
        if not any(answer.strip() for answer in answers):
            raise ValueError("expected at least one answer")
        return answers


class TruthfulQAOriginal(Row):
    """The format of the authors' own file: answers in one cell, separated by semicolons."""

    question: str = Field(alias="Question")
    correct_answers: str = Field(alias="Correct Answers", pattern=r"[^;\s]")
    incorrect_answers: str = Field(alias="Incorrect Answers", pattern=r"[^;\s]")

    def hub(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "correct_answers": _answers(self.correct_answers),
            "incorrect_answers": _answers(self.incorrect_answers),
        }


class GSM8K(Row):
    question: str
    answer: str = Field(pattern=r"####")


FORMATS: dict[str, tuple[type[Row], ...]] = {
    "arc_easy": (ArcEasy,),
    "gsm8k": (GSM8K,),
    "hellaswag": (HellaSwag,),
    "mathqa": (MathQA,),
    "openbookqa": (OpenBookQA, OpenBookQAOriginal),
    "piqa": (Piqa,),
    "truthfulqa_gen": (TruthfulQA, TruthfulQAOriginal),
    "winogrande": (Winogrande,),
}


def _require_member(answer: str, labels: list[str]) -> None:
    if answer not in labels:
        raise ValueError(f"expected an answerKey of {', '.join(labels)}, found {answer!r}")


def _answers(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(";") if answer.strip()]
