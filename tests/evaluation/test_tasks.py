"""Tasks of lm-evaluation-harness on local files: conversion, checks, and the results of tiny random models."""

from __future__ import annotations

import csv
import gc
import json
import math
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import svdllm
from families import tiny_model
from runs import TEXT, save_dense, small_recipe
from svdllm.cli import main
from svdllm.common.errors import InputError
from svdllm.common.progress import Reporter
from svdllm.evaluation import side_by_side
from svdllm.evaluation.side_by_side import evaluate_models
from svdllm.evaluation.tasks import TaskSuite, open_tasks, run_tasks
from svdllm.evaluation.tasks.index import tasks_folder
from svdllm.evaluation.tasks.local_files import find_files, read_file
from svdllm.evaluation.tasks.record import Metric, TaskScore, accuracy_average, compare_score, scores_of
from svdllm.models.open import open_config

pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'eval'")

WORDS = ["rank", "block", "metric", "gram", "basis", "ratio", "factor", "window", "token", "sketch"]


def arc_easy(number: int) -> dict[str, Any]:
    texts = [WORDS[(number + shift) % 10] for shift in range(3 if number == 0 else 4)]
    labels = "ABCD"[: len(texts)]
    return {
        "question": f"Which {WORDS[number % 10]}?",
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": labels[number % 3],
    }


def openbookqa(number: int) -> dict[str, Any]:
    choices = [{"text": WORDS[(number + shift) % 10], "label": "ABCD"[shift]} for shift in range(4)]
    return {
        "id": str(number),
        "question": {"stem": f"The {WORDS[number % 10]} is", "choices": choices},
        "answerKey": "ABCD"[number % 4],
    }


def truthfulqa(number: int) -> dict[str, str]:
    return {
        "Type": "Adversarial",
        "Category": "Words",
        "Question": f"What is a {WORDS[number % 10]}?",
        "Best Answer": "A word",
        "Correct Answers": "A word; A thing, with a comma;",
        "Incorrect Answers": "A fruit; A fox",
        "Source": "made up",
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "arc_easy.test.jsonl": arc_easy,
    "openbookqa.test.jsonl": openbookqa,
    "truthfulqa.csv": truthfulqa,
    "winogrande.validation.jsonl": lambda n: {
        "sentence": f"The {WORDS[n % 10]} met the fox and _ ran.",
        "option1": "the fox",
        "option2": "the dog",
        "answer": "12"[n % 2],
    },
    "hellaswag.validation1000.jsonl": lambda n: {
        "ind": n,
        "activity_label": WORDS[n % 10],
        "ctx_a": "A fox jumps.",
        "ctx_b": "then it",
        "ctx": "A fox jumps. then it",
        "endings": ["rests.", "sings.", "counts [step] ranks.", "keeps a matrix."],
        "label": n % 4,
    },
    "piqa.validation.jsonl": lambda n: {"goal": WORDS[n % 10], "sol1": "jump", "sol2": "run fast", "label": n % 2},
    "mathqa.test.jsonl": lambda n: {
        "Problem": f"what is {n} + 1 ?",
        "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) none of these",
        "correct": "abcde"[n % 5],
    },
    "gsm8k.test.jsonl": lambda n: {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"},
    "gsm8k.train500.jsonl": lambda n: {"question": f"What is {n} + 2?", "answer": f"It is {n + 2}.\n#### {n + 2}"},
}
ALL = "openbookqa,arc_easy,winogrande,hellaswag,piqa,mathqa,truthfulqa_gen,gsm8k"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the eight tasks as they are distributed."""
    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        write_rows(folder / name, [row(number) for number in range(6)])
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    return save_dense(folder, tokenizer=tokenizer, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    (dense.parent / "text.txt").write_text(TEXT)
    svdllm.compress(dense, small_recipe(calibration=str(dense.parent / "text.txt")), dense.parent / "out")
    return dense.parent / "out"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips what takes seconds: the harness's look at the machine, long answers and intervals of ROUGE."""
    monkeypatch.setattr("rouge_score.scoring.BootstrapAggregator.__init__.__defaults__", (0.95, 2))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", None)  # it would read all definitions once more
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.max_gen_toks", 8)


@pytest.fixture
def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three folders of the harness's definitions instead of thousands."""
    for name in ("arc", "piqa", "super_glue"):
        shutil.copytree(tasks_folder() / name, tmp_path / "lm_eval" / "tasks" / name)
    monkeypatch.setattr("svdllm.evaluation.tasks.index.tasks_folder", lambda: tmp_path / "lm_eval" / "tasks")


def ready(names: list[str], **settings: Any) -> TaskSuite:
    with open_tasks(names, **settings) as suite:
        return suite


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_eight_tasks_side_by_side(
    data: Path, dense: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_network: list
) -> None:
    arguments = ("eval", compressed, "--base", dense, "--tasks", ALL, "--task-data", data, "--offline")
    assert cli(*arguments, "--limit", 4, "--output", tmp_path / "kept", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert no_network == []
    ours, theirs = document["tasks"]
    assert [score["task"] for score in ours["scores"]] == ALL.split(",")
    main_metrics = {score["task"]: score["main"]["name"] for score in ours["scores"]}
    assert main_metrics == dict.fromkeys(ALL.split(","), "acc") | {"truthfulqa_gen": "bleu_acc", "gsm8k": "exact_match"}
    assert {score["num_examples"] for score in ours["scores"]} == {4}
    chances = {score["task"]: score["chance"] for score in ours["scores"]}
    assert chances == {
        **dict.fromkeys(("openbookqa", "hellaswag"), 0.25),
        **dict.fromkeys(("winogrande", "piqa"), 0.5),
        "arc_easy": pytest.approx((1 / 3 + 3 / 4) / 4),  # one of the four has three choices
        "mathqa": pytest.approx(0.2),
        "truthfulqa_gen": None,
        "gsm8k": None,
    }
    assert ours["files"]["gsm8k"]["train"]["rows"] == 6
    for row, score, dense_score in zip(document["comparison"], ours["scores"], theirs["scores"], strict=True):
        assert (row["task"], row["score"], row["dense"]) == (
            score["task"],
            score["main"]["value"],
            dense_score["main"]["value"],
        )
    harness = json.loads((tmp_path / "kept" / "lm-eval-model.json").read_text())
    assert harness == ours["harness"]
    assert harness["n-shot"] == dict.fromkeys(ALL.split(","), 0) | {"gsm8k": 5}
    assert harness["results"]["piqa"]["acc,none"] == ours["scores"][4]["main"]["value"]
    stored = json.loads((tmp_path / "kept" / "evaluation.json").read_text())
    assert stored["comparison"] == document["comparison"]
    assert cli(*arguments, "--output", tmp_path / "kept") == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_the_definition_is_the_harnesss(data: Path) -> None:
    """All that a local definition differs in is where data come from, and splits that have no file."""
    from lm_eval.tasks import TaskManager

    built_in = TaskManager(include_defaults=False, include_path=str(tasks_folder() / "gsm8k")).task_index["gsm8k"].cfg
    with open_tasks(["gsm8k"], task_data=data) as suite:
        ours = suite.manager.task_index["gsm8k"].cfg
        shown = suite.members["gsm8k"].sampler.df
    replaced = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset"}
    assert {key: value for key, value in ours.items() if key not in replaced} == {
        key: value for key, value in built_in.items() if key not in replaced
    }
    assert shown[0]["question"] == "What is 0 + 2?"  # of the file of the training split


def test_accuracy_is_that_of_the_log_likelihoods(data: Path, dense: Path) -> None:
    """The model itself, one choice at a time, without the harness."""
    results = svdllm.evaluate_tasks(str(dense), ["arc_easy"], task_data=data, batch_size=3)
    model = svdllm.load_model(dense).eval()
    tokenizer = open_config(dense).load_tokenizer()
    right = []
    for number in range(6):
        row = arc_easy(number)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        sums = []
        for text in row["choices"]["text"]:
            choice = tokenizer(f" {text}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            sums.append(sum(logs[len(prompt) + place - 1, token].item() for place, token in enumerate(choice)))
        right.append(sums.index(max(sums)) == row["choices"]["label"].index(row["answerKey"]))
    (score,) = results.scores
    mean = sum(right) / 6
    assert 0 < mean < 1
    assert score.main.value == pytest.approx(mean)
    assert score.main.stderr == pytest.approx(math.sqrt(mean * (1 - mean) / 5))
    assert [metric.name for metric in score.metrics] == ["acc", "acc_norm"]


def test_rows_become_the_hubs(data: Path, tmp_path: Path) -> None:
    converted = read_file(data / "openbookqa.test.jsonl", "openbookqa").rows[1]
    assert converted == {
        "question_stem": "The block is",
        "choices": {"text": ["block", "metric", "gram", "basis"], "label": list("ABCD")},
        "answerKey": "B",
    }
    again = write_rows(tmp_path / "openbookqa.test.jsonl", [converted | {"id": "x"}])
    assert read_file(again, "openbookqa").rows == [converted]
    assert read_file(data / "hellaswag.validation1000.jsonl", "hellaswag").rows[3]["label"] == "3"
    assert read_file(data / "truthfulqa.csv", "truthfulqa_gen").rows[0] == {
        "question": "What is a rank?",
        "correct_answers": ["A word", "A thing, with a comma"],
        "incorrect_answers": ["A fruit", "A fox"],
    }
    cells = write_rows(tmp_path / "piqa.validation.csv", [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])
    assert read_file(cells, "piqa").rows[0]["label"] == 1


def changed(name: str, **cells: Any) -> list[dict[str, Any]]:
    """Six good rows, the third of them changed; None removes a column."""
    rows = [ROWS[name](number) for number in range(6)]
    rows[2] = {key: value for key, value in (rows[2] | cells).items() if value is not None}
    return rows


@pytest.mark.parametrize(
    ("name", "cells", "message"),
    [
        (
            "piqa.validation.jsonl",
            {"label": None},
            "row 3: no column 'label'; expected columns goal, sol1, sol2, label",
        ),
        (
            "piqa.validation.jsonl",
            {"label": 2},
            r"row 3: column 'label': Input should be 0, 1.*, found 2; expected col",
        ),
        (
            "piqa.validation.jsonl",
            {"goal": 7},
            r"row 3: column 'goal': Input should be a valid string, found 7; .*sol2",
        ),
        ("arc_easy.test.jsonl", {"answerKey": "E"}, "row 3: expected an answerKey of A, B, C, D, found 'E'"),
        (
            "arc_easy.test.jsonl",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "as many labels as texts, found 1 and",
        ),
        ("arc_easy.test.jsonl", {"choices": ["a", "b"]}, "row 3: column 'choices': Input should be a valid dict"),
        ("openbookqa.test.jsonl", {"answerKey": "Z"}, "row 3: expected an answerKey of A, B, C, D, found 'Z'"),
        ("openbookqa.test.jsonl", {"question": {"stem": "s"}}, "row 3: no column 'question.choices'"),
        (
            "winogrande.validation.jsonl",
            {"answer": "3"},
            "row 3: column 'answer': Input should be '1' or '2', found '3'",
        ),
        (
            "winogrande.validation.jsonl",
            {"sentence": "no gap"},
            "row 3: column 'sentence': expected a sentence with a gap",
        ),
        ("hellaswag.validation1000.jsonl", {"label": 4}, "row 3: expected a label from 0 to 3, found 4"),
        ("mathqa.test.jsonl", {"correct": "f"}, "row 3: column 'correct': Input should be 'a', 'b'"),
        (
            "mathqa.test.jsonl",
            {"options": "a ) 1"},
            "example 3: mathqa has no prompt for it .the answer is choice 3 of 0",
        ),
        ("gsm8k.test.jsonl", {"answer": "2"}, "row 3: column 'answer': String should match pattern '####', found '2'"),
        ("truthfulqa.csv", {"Correct Answers": " ; "}, "row 3: column 'Correct Answers': String should match pattern"),
    ],
)
def test_wrong_rows_are_named(name: str, cells: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    write_rows(tmp_path / "data" / name, changed(name, **cells))
    task = {"truthfulqa": "truthfulqa_gen"}.get(name.split(".")[0], name.split(".")[0])
    with pytest.raises(InputError, match=message):
        ready([task], task_data=tmp_path / "data")


@pytest.mark.parametrize(
    ("files", "task", "settings", "message"),
    [
        (
            {},
            "piqa",
            {},
            r"piqa is evaluated on its split validation, of which .* has no file: expected piqa.validation",
        ),
        ({}, "truthfulqa_gen", {}, "expected truthfulqa_gen.validation.jsonl .* or truthfulqa.csv"),
        (
            {"piqa.jsonl": "piqa"},
            "piqa",
            {},
            "piqa has no split '', it has train, validation: rename the file, as in piqa.v",
        ),
        ({"piqa.test.jsonl": "piqa"}, "piqa", {}, "piqa has no split 'test', it has train, validation"),
        ({"piqa.train.jsonl": "piqa"}, "piqa", {}, "piqa is evaluated on its split validation"),
        (
            {"piqa.validation.jsonl": "piqa", "piqa.validation2.jsonl": "piqa"},
            "piqa",
            {},
            "piqa.validation2.jsonl are both the split validation of piqa: keep one",
        ),
        (
            {"piqa.validation.jsonl": "gsm8k"},
            "piqa",
            {},
            r"row 1: no column 'goal', 'label', 'sol1', 'sol2'; .*found ques",
        ),
        ({"gsm8k.test.jsonl": "gsm8k"}, "gsm8k", {}, "gsm8k shows 5 examples of its split train, of which"),
        ({"piqa.validation.jsonl": "piqa"}, "piqa", {"num_fewshot": 2}, "piqa shows 2 examples of its split train"),
        (
            {"gsm8k.test.jsonl": "gsm8k", "gsm8k.train.jsonl": "gsm8k"},
            "gsm8k",
            {"num_fewshot": 7},
            "gsm8k.train.jsonl has 6 rows, and gsm8k shows 7 examples of it",
        ),
        ({}, "piqa", {"limit": 0}, "limit must be at least 1 example of every task, found 0"),
        ({}, "piqa", {"num_fewshot": -1}, "num_fewshot must not be negative, found -1"),
        ({}, "", {}, "no task is named"),
    ],
)
def test_what_cannot_be_run_is_refused(
    files: dict[str, str], task: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, kind in files.items():
        row = next(made for file, made in ROWS.items() if file.startswith(kind))
        write_rows(tmp_path / name, [row(number) for number in range(6)])
    with pytest.raises(InputError, match=message):
        ready([task], task_data=tmp_path, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("Question,Correct Answers,Incorrect Answers\n", "has no rows"),
        ("Question,Correct Answers,Incorrect Answers\nWhy?,so\n", "row 1: expected as many cells as in the first line"),
        (
            "Question,Correct Answers\nWhy?,so\n",
            "row 1: no column 'Incorrect Answers'; .*, or Question, Correct Answers",
        ),
        (b"Question\n\xff\n", "is not a CSV file in UTF-8"),
    ],
)
def test_broken_csv(content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "truthfulqa.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        ready(["truthfulqa_gen"], task_data=tmp_path)


def test_the_longest_split_of_a_name(tmp_path: Path) -> None:
    for name in ("mnli.validation_mismatched.jsonl", "mnli.validation.jsonl", "mnli_other.validation.jsonl", "mnli.md"):
        (tmp_path / name).touch()
    found = find_files(tmp_path, "mnli", ["validation", "validation_mismatched"], "validation")
    assert {split: path.name for split, path in found.items()} == {
        "validation": "mnli.validation.jsonl",
        "validation_mismatched": "mnli.validation_mismatched.jsonl",
    }


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a folder; expected one with files like piqa"):
        ready(["piqa"], task_data=tmp_path / "none")


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_esay", "has no task 'arc_esay', did you mean 'arc_easy'"),
        ("PIQA", "did you mean 'piqa'"),
        ("zzzz", "has no task 'zzzz': `lm-eval ls tasks` lists them all"),
    ],
)
def test_unknown_tasks(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ready(["piqa", name])


@pytest.mark.usefixtures("small_index")
def test_a_tag_stands_for_several_tasks(data: Path) -> None:
    with pytest.raises(InputError, match="ai2_arc stands for several tasks; with --task-data name each task itself"):
        ready(["ai2_arc"], task_data=data)


WORDS_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder}}}
test_split: test
output_type: multiple_choice
doc_to_text: goal
doc_to_choice: "{{{{[sol1, sol2]}}}}"
doc_to_target: label
"""
WORDS_GROUP = """
group: words
task: [words_one, words_two]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.mark.usefixtures("small_index")
def test_a_group(data: Path, dense: Path, tmp_path: Path) -> None:
    """Its members and the figure of the whole, which counts once."""
    folder = tmp_path / "lm_eval" / "tasks" / "words"
    folder.mkdir()
    (folder / "group.yaml").write_text(WORDS_GROUP)
    for name in ("words_one", "words_two"):
        content = WORDS_TASK.format(name=name, file=data / "piqa.validation.jsonl", folder=tmp_path / "cache")
        (folder / f"{name}.yaml").write_text(content)
    results = svdllm.evaluate_tasks(str(dense), ["words"])
    one, two, whole = results.scores
    assert [(score.task, score.group) for score in results.scores] == [
        ("words_one", "words"),
        ("words_two", "words"),
        ("words", None),
    ]
    assert whole.main.value == pytest.approx((one.main.value + two.main.value) / 2)
    assert accuracy_average(results.scores) is None
    with pytest.raises(InputError, match="the tasks overlap: Duplicate task 'words_one'"):
        ready(["words", "words_one"])


@pytest.mark.usefixtures("small_index")
def test_another_task_of_the_harness(tmp_path: Path, dense: Path) -> None:
    """Files in the hub's own columns, and what is wrong with them as the harness's definition meets it."""
    rows = [{"passage": "A fox.", "question": f"is it {n}", "idx": n, "label": n % 2} for n in range(5)]
    file = write_rows(tmp_path / "boolq.validation.jsonl", rows)
    results = svdllm.evaluate_tasks(str(dense), ["boolq"], task_data=tmp_path)
    (score,) = results.scores
    assert (score.task, score.num_examples, score.chance) == ("boolq", 5, 0.5)
    write_rows(file, [{key: value for key, value in row.items() if key != "passage"} for row in rows])
    with pytest.raises(InputError, match=r"boolq.validation.jsonl: the task boolq cannot be made of it .*passage"):
        ready(["boolq"], task_data=tmp_path)
    write_rows(file, [*rows, {"passage": "A dog."}])
    with pytest.raises(InputError, match="row 6: expected the columns of row 1, passage, question, idx, label; found"):
        ready(["boolq"], task_data=tmp_path)
    write_rows(file, [*rows, rows[0] | {"label": "yes"}])
    with pytest.raises(InputError, match="a column holds values of more than one type"):
        ready(["boolq"], task_data=tmp_path)


def test_data_that_cannot_be_had_without_a_network(no_network: list) -> None:
    with pytest.raises(
        InputError, match=r"the data of the task piqa cannot be loaded .* or give files with --task-data"
    ):
        ready(["piqa"], offline=True)
    assert no_network == []


def test_packages_that_are_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.truthfulqa.utils", raising=False)
    with pytest.raises(
        InputError, match=r"truthfulqa_gen needs the package 'rouge_score': pip install 'svdllm\[eval\]'"
    ):
        ready(["truthfulqa_gen"], task_data=data)
    monkeypatch.setattr("svdllm.common.extras.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package 'lm_eval': pip install 'svdllm\[eval\]'"):
        ready(["piqa"])


def test_examples_shown(data: Path, dense: Path, tmp_path: Path) -> None:
    """``num_fewshot`` replaces a task's own number, but where that is 0 by definition."""
    shutil.copytree(data, tmp_path / "data")
    write_rows(tmp_path / "data" / "arc_easy.train.jsonl", [arc_easy(number) for number in range(4)])
    reporter = Reporter()
    with open_tasks(
        ["arc_easy", "truthfulqa_gen"], num_fewshot=2, limit=1, task_data=tmp_path / "data", reporter=reporter
    ) as suite:
        (evaluation,) = evaluate_models([str(dense)], tasks=suite, reporter=reporter)
        (request, *_) = suite.members["arc_easy"].instances
    assert request.args[0].count("Question:") == 3
    assert evaluation.tasks is not None
    assert [score.num_fewshot for score in evaluation.tasks.scores] == [2, 0]
    assert any("truthfulqa_gen is defined with 0 examples shown" in warning for warning in reporter.warnings)


class Steps(Reporter):
    """What a reporter is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int, int]] = []

    def start_stage(self, name: str, steps: int) -> None:
        self.name = name

    def advance(self, done: int, steps: int) -> None:
        self.told.append((self.name, done, steps))


def test_progress_and_what_the_harness_warns_of(data: Path, dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Steps()
    model = svdllm.load_model(dense)
    model.config.max_position_embeddings = 100  # so prompts are cut
    tokenizer = open_config(dense).load_tokenizer()
    tokenizer.model_max_length = 10_000
    capfd.readouterr()
    with open_tasks(["piqa", "gsm8k"], limit=2, task_data=data) as suite:
        run_tasks(model, tokenizer, suite, name="some/dense", batch_size=1, reporter=reporter)
    assert reporter.told == [
        *(("dense: choices", done, 4) for done in range(1, 5)),
        *(("dense: answers", done, 2) for done in range(1, 3)),
    ]
    (warning,) = reporter.warnings
    assert warning.startswith("lm-evaluation-harness: Left truncation")
    assert warning.endswith("(and 1 times more)")
    assert capfd.readouterr().err == ""


def test_one_model_at_a_time(data: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(name: str, **settings: Any) -> Any:
        gc.collect()
        assert all(reference() is None for reference in loaded)
        model = svdllm.load_model(name, **settings)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(side_by_side, "load_model", load)
    text = dense.parent / "some.txt"
    text.write_text(TEXT)
    with open_tasks(["piqa"], limit=1, task_data=data) as suite:
        found = evaluate_models([str(dense)] * 3, [str(text)], tasks=suite, seqlen=32, max_windows=1)
    assert len(loaded) == len(found) == 3


@pytest.mark.parametrize("broken", ["tokenizer", "context", "no model"])
def test_what_is_wrong_with_a_model_is_seen_before_one_is_loaded(
    broken: str, data: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    bad = tmp_path / "bad"
    shutil.copytree(dense, bad)
    message = {
        "tokenizer": "has no tokenizer",
        "context": "gsm8k: an answer of 256 tokens after a prompt of at least one, 257 is beyond",
        "no model": "not a model f",
    }
    if broken == "tokenizer":
        for file in bad.glob("tokenizer*"):
            file.unlink()
    elif broken == "context":
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    else:
        (bad / "config.json").unlink()
    with open_tasks(["gsm8k"], task_data=data) as suite, pytest.raises(InputError, match=message[broken]):
        evaluate_models([str(dense), str(bad)], tasks=suite)


def metric(value: float, stderr: float | None = 0.01, *, name: str = "acc", more: bool = True) -> Metric:
    return Metric(name=name, filter="none", value=value, stderr=stderr, higher_is_better=more)


def score(main_metric: Metric, chance: float | None = None) -> TaskScore:
    return TaskScore(
        task="t", version=1, main=main_metric, metrics=[main_metric], num_examples=9, num_fewshot=0, chance=chance
    )


def test_shares_by_hand() -> None:
    row = compare_score(score(metric(0.5), 0.25), score(metric(0.75), 0.25))
    assert row.kept == pytest.approx(2 / 3)
    assert row.kept_above_chance == pytest.approx(0.5)
    at_chance = compare_score(score(metric(0.2), 0.2), score(metric(0.219), 0.2))  # 1.9 standard errors
    assert at_chance.kept == pytest.approx(0.2 / 0.219)
    assert at_chance.kept_above_chance is None
    assert compare_score(score(metric(0.1)), score(metric(0.2))).kept_above_chance is None
    assert compare_score(score(metric(0.1), 0.5), score(metric(0.9, None), 0.5)).kept_above_chance is None
    assert compare_score(score(metric(0.1)), score(metric(0.0))).kept is None
    less_is_better = [metric(value, name="word_perplexity", more=False) for value in (20.0, 10.0)]
    assert compare_score(*map(score, less_is_better)).kept == pytest.approx(0.5)


def test_mean_of_accuracies_by_hand() -> None:
    scores = [score(metric(0.5, 0.03)), score(metric(0.7, 0.04)), score(metric(9.0, name="exact_match"))]
    assert accuracy_average(scores) == (pytest.approx(0.6), pytest.approx(0.025))
    assert accuracy_average(scores[1:]) is None
    assert accuracy_average([*scores, score(metric(0.6, None))]) == (pytest.approx(0.6), None)


def test_figures_that_are_not_finite_are_none_in_json() -> None:
    harness = {
        "results": {
            "wikitext": {"sample_len": 2, "word_perplexity,none": math.inf, "word_perplexity_stderr,none": "N/A"}
        },
        "higher_is_better": {"wikitext": {"word_perplexity": False}},
        "versions": {"wikitext": 2.0},
        "n-shot": {"wikitext": 0},
    }
    (found,) = scores_of(harness, {})
    assert found.main == metric(math.inf, None, name="word_perplexity", more=False)
    row = compare_score(found, found).to_dict()
    assert row["score"] is None
    assert json.dumps(row, allow_nan=False)


def test_the_table(data: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tasks", "piqa", "--tasks", "arc_easy,piqa", "--task-data", data, "--limit", 3)
    assert cli("eval", dense, "--base", dense, *arguments, "--output", tmp_path / "new" / "kept.json") == 0
    printed = capsys.readouterr().out
    assert "the first 3 examples of each" in printed
    assert "mean of acc" in printed
    assert "kept: score / dense score" in printed
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("arc_easy")]
    assert row[1:4] == ["acc", "3", "0.28"]
    assert row[4:6] == row[6:8]
    document = json.loads((tmp_path / "new" / "kept.json").read_text())
    assert [score["task"] for score in document["tasks"][0]["scores"]] == ["piqa", "arc_easy"]
    assert document["tasks"][1]["harness"]["versions"] == {"piqa": 1.0, "arc_easy": 1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "piqa", "--limit", "0"], "limit must be at least 1"),
        (["--ppl", "python-docs", "--limit", "5"], "--limit does nothing without --tasks"),
        (["--ppl", "python-docs", "--num-fewshot", "5"], "--num-fewshot does nothing without --tasks"),
        (["--ppl", "python-docs", "--task-data", "."], "--task-data does nothing without --tasks"),
        (["--tasks", "piqa,", "--limit", "5"], "no task is named"),
        (
            ["--ppl", "python-docs", "--protocol", "sliding"],
            "unknown protocol 'sliding': expected one of windows, rolling",
        ),
        ([], "Nothing to measure"),
    ],
)
def test_bad_options(arguments: list[str], said: str, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("eval", dense, *arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_choice_beyond_the_context_is_no_traceback(tokenizer: Any) -> None:
    from svdllm.evaluation.tasks.harness_model import HarnessModel

    model = HarnessModel(tiny_model("llama", vocab_size=300), tokenizer, 1, Reporter(), "small")
    requests = [(("", ""), [1], [3] * 64), (("", ""), [1], [3] * 65)]
    assert len(model._loglikelihood_tokens(requests[:1])) == 1
    with pytest.raises(InputError, match="small takes 64 tokens, and a choice of the tasks has 65"):
        model._loglikelihood_tokens(requests)
