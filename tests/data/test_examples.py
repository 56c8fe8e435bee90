"""Instructions, chats and text as training examples: what is read, what is learnt, what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from svdllm.common.errors import InputError
from svdllm.data.examples import NO_LABEL, holds_examples, padded, training_examples

ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Count.", "output": "one two three"},
]
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:\n"
)


@pytest.fixture
def alpaca(tmp_path: Path) -> str:
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(ROWS))
    return str(file)


def written(tmp_path: Path, *rows: Any) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_prompts_are_those_the_data_were_written_for(alpaca: str, tokenizer: Any) -> None:
    examples = training_examples(alpaca, tokenizer, seqlen=1000)
    texts = [tokenizer.decode(ids) for ids, _ in examples.rows]
    assert texts[0] == WITH_INPUT + "3" + tokenizer.eos_token
    assert texts[1] == WITHOUT_INPUT + "hello" + tokenizer.eos_token
    assert examples.kind == "instructions"
    assert examples.num_tokens == sum(map(len, (ids for ids, _ in examples.rows)))


def test_only_answers_are_learnt_by_default(alpaca: str, tokenizer: Any) -> None:
    for (ids, labels), row in zip(training_examples(alpaca, tokenizer, seqlen=1000).rows, ROWS, strict=True):
        learnt = labels != NO_LABEL
        assert tokenizer.decode(ids[learnt]) == row["output"] + tokenizer.eos_token
        assert torch.equal(labels[learnt], ids[learnt])
        assert bool(learnt[-1])
        assert learnt.diff().sum() == 1  # the prompt first, then the answer
    for ids, labels in training_examples(alpaca, tokenizer, seqlen=1000, completions_only=False).rows:
        assert torch.equal(ids, labels)


def test_packing_keeps_every_token_in_its_order(alpaca: str, tokenizer: Any) -> None:
    apart = training_examples(alpaca, tokenizer, seqlen=1000)
    packed = training_examples(alpaca, tokenizer, seqlen=32, packing=True, completions_only=False)
    stream = torch.cat([ids for ids, _ in apart.rows])
    together = torch.cat([ids for ids, _ in packed.rows])
    assert all(len(ids) == 32 for ids, _ in packed.rows)
    assert torch.equal(together, stream[: len(together)])
    assert len(stream) - len(together) < 32


def test_examples_whose_answer_is_cut_off_are_left_out_and_counted(alpaca: str, tokenizer: Any) -> None:
    lengths = [int((labels == NO_LABEL).sum()) for _, labels in training_examples(alpaca, tokenizer, seqlen=1000).rows]
    seqlen = max(lengths)  # the longest prompt fills it
    found = training_examples(alpaca, tokenizer, seqlen=seqlen)
    assert found.left_out == 1
    assert [len(ids) <= seqlen for ids, _ in found.rows] == [True, True]
    with pytest.raises(InputError, match="no answer begins within 4 tokens"):
        training_examples(alpaca, tokenizer, seqlen=4)


def test_text_becomes_windows_without_overlap(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog " * 20)
    found = training_examples(str(file), tokenizer, seqlen=16)
    stream = torch.tensor(tokenizer(file.read_text())["input_ids"])
    assert found.kind == "text"
    assert torch.equal(torch.cat([ids for ids, _ in found.rows]), stream[: len(stream) // 16 * 16])
    assert not holds_examples(str(file))


def test_prompts_and_completions_are_taken_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    source = written(tmp_path, {"prompt": "2 + 2 =", "completion": " 4"})
    ((ids, labels),) = training_examples(source, tokenizer, seqlen=50).rows
    assert tokenizer.decode(ids) == "2 + 2 = 4" + tokenizer.eos_token
    assert tokenizer.decode(ids[labels == NO_LABEL]) == "2 + 2 ="
    assert holds_examples(source)


def test_chats_are_rendered_by_the_tokenizers_template(tmp_path: Path, tokenizer: Any) -> None:
    from copy import deepcopy

    chatty = deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    source = written(tmp_path, {"messages": messages})
    ((ids, labels),) = training_examples(source, chatty, seqlen=100).rows
    assert chatty.decode(ids) == "[user]hi\n[assistant]hello\n"
    assert chatty.decode(ids[labels != NO_LABEL]) == "hello\n"
    for row in ({"instruction": "hi", "output": "hello"}, {"prompt": "hi", "completion": "hello"}):
        asked = written(tmp_path, row)
        ((same, _),) = training_examples(asked, chatty, seqlen=100, template="chat").rows
        assert torch.equal(same, ids)
    with pytest.raises(InputError, match="row 0: the tokenizer has no chat template"):
        training_examples(asked, tokenizer, seqlen=100, template="chat")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "output": 3}], "row 0: expected text in 'output', found int"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "row 0: expected messages of which the last"),
        ([{"question": "a", "answer": "b"}], "has no column 'text' or 'messages', it has: answer, question"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(rows: list[Any], message: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        training_examples(written(tmp_path, *rows), tokenizer, seqlen=50)


def test_padding_is_neither_seen_nor_learnt() -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    batch = padded([{"input_ids": ids, "labels": ids} for ids in rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, NO_LABEL, NO_LABEL]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
