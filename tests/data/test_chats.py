"""Chats as people have them: contents in parts or null, lists of messages in strings, templates of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svdllm.common.errors import InputError
from svdllm.data import evaluation_tokens
from svdllm.data.examples import NO_LABEL, training_examples
from tokenizers_local import byte_tokenizer

TEXTS_ONLY = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As templates of today are: a text, or parts one after the other; tools.
OF_TODAY = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if 'image' in part %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_ONLY = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def rendered(tmp_path: Path, template: str, *chats: Any, field: str = "messages") -> str:
    tokenizer = byte_tokenizer(chat_template=template)
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({field: chat}) + "\n" for chat in chats))
    return tokenizer.decode(evaluation_tokens(str(file), tokenizer))


@pytest.mark.parametrize(("template", "text"), [(TEXTS_ONLY, "one\ntwo"), (OF_TODAY, "onetwo")])
def test_parts_of_text_go_to_a_template_that_reads_them_and_are_joined_for_another(
    template: str, text: str, tmp_path: Path
) -> None:
    user = {"role": "user", "content": [part("one"), part("two")]}
    assert rendered(tmp_path, template, [user, ANSWER]) == f"<user>{text}\n<assistant>hello\n"


def test_nulls_that_parquet_fills_in_are_no_images(tmp_path: Path) -> None:
    user = {"role": "user", "content": [part("one", image=None)], "tool_calls": None, "name": None}
    assert rendered(tmp_path, OF_TODAY, [user]) == "<user>one\n"


@pytest.mark.parametrize("content", [None, ""])
def test_a_message_that_only_calls_a_tool(content: str | None, tmp_path: Path) -> None:
    call = CALL | {"content": content}
    absent = {key: value for key, value in call.items() if key != "content"}
    for message in (call, absent):
        assert (
            rendered(tmp_path, OF_TODAY, [USER, message, ANSWER]) == "<user>hi\n<assistant>[clock]\n<assistant>hello\n"
        )
        with pytest.raises(InputError, match=r"row 0: a message only calls tools, which the .* does not know"):
            rendered(tmp_path, TEXTS_ONLY, [USER, message, ANSWER])


@pytest.mark.parametrize("field", ["messages", "text", "conversation"])
def test_a_list_of_messages_in_a_string_is_read(field: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=TEXTS_ONLY)
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({field: json.dumps([USER, ANSWER], indent=1)}) + "\n" for _ in range(2)))
    ids = evaluation_tokens(f"{file}:{field}", tokenizer)
    assert tokenizer.decode(ids) == "<user>hi\n<assistant>hello\n" * 2


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        ([{"role": "user", "content": 5}], TEXTS_ONLY, "content of a message must be text, a list .*, found int$"),
        ([{"role": "user", "content": {"text": "a"}}], TEXTS_ONLY, "must be text, a list .*, found dict$"),
        ([{"role": "user", "content": None}], OF_TODAY, "a message of the user has no content and calls no tool"),
        ([{"role": "user"}], OF_TODAY, "a message must have 'role' and 'content', found an object with role$"),
        ([{"role": None, "content": "a"}], OF_TODAY, "the role of a message must be text, found NoneType"),
        ([{"role": "user", "content": ["a"]}], OF_TODAY, "a part of type str, expected only parts like"),
        (
            [{"role": "user", "content": [part("a"), {"type": "image_url", "image_url": "x.png"}]}],
            OF_TODAY,
            "a part of type image_url, expected only parts like .*reads no images or sound, leave such rows out",
        ),
        ([{"from": "human", "value": "hi"}], OF_TODAY, "found an object with from, value: rename 'from' to 'role'"),
        ([USER], PARTS_ONLY, "the tokenizer's chat template leaves out what the messages say"),
        ([USER], "{{ messages[0]['content'] + 1 }}", r"refuses the messages \(can only concatenate str .*\)$"),
        ([USER], "{% for m in messages %}", r"refuses the messages \(Unexpected end of template"),
        ("[{'role': 'user', 'content': 'hi'}]", OF_TODAY, "begins like a list of messages is not valid JSON .*: keep"),
        ([{"role": "user", "content": "\ud83d"}], OF_TODAY, r"character 6 is '\\ud83d', half of a surrogate pair"),
    ],
)
def test_chats_that_cannot_be_read_are_named(chat: Any, template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"chats\.jsonl:messages, row 0: .*{message}"):
        rendered(tmp_path, template, chat)


def test_a_text_file_may_be_one_chat(tmp_path: Path) -> None:
    file = tmp_path / "chat.txt"
    file.write_text(json.dumps([USER, ANSWER], indent=1))
    tokenizer = byte_tokenizer(chat_template=TEXTS_ONLY)
    assert tokenizer.decode(evaluation_tokens(str(file), tokenizer)) == "<user>hi\n<assistant>hello\n"


def test_a_column_holds_texts_or_chats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 1: expected text \(str\) as in row 0, found a list, as of a chat"):
        rendered(tmp_path, TEXTS_ONLY, "plain", json.dumps([USER]), field="text")
    with pytest.raises(InputError, match="row 1: expected a list of at least one message, found str"):
        rendered(tmp_path, TEXTS_ONLY, json.dumps([USER]), "plain", field="text")


def test_training_reads_chats_alike(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=TEXTS_ONLY)
    file = tmp_path / "chats.jsonl"
    chats = [[USER, ANSWER], json.dumps([USER, ANSWER]), [{"role": "user", "content": [part("hi")]}, ANSWER]]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    rows = training_examples(str(file), tokenizer, seqlen=100).rows
    assert {tokenizer.decode(ids) for ids, _ in rows} == {"<user>hi\n<assistant>hello\n"}
    assert {tokenizer.decode(ids[labels != NO_LABEL]) for ids, labels in rows} == {"hello\n"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "row 1: the content of a message must be text"),
        ({"instruction": "Add.", "input": 5, "output": "6"}, "row 1: expected text in 'input', found int"),
        ({"instruction": "Add.", "output": "cut \ud83d"}, "row 1: character 4 is .* half of a surrogate pair"),
    ],
)
def test_training_names_the_row(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first = {"messages": [USER, ANSWER]} if "messages" in row else {"instruction": "Add.", "output": "6"}
    file.write_text(json.dumps(first) + "\n" + json.dumps(row))
    with pytest.raises(InputError, match=message):
        training_examples(str(file), byte_tokenizer(chat_template=TEXTS_ONLY), seqlen=100)
