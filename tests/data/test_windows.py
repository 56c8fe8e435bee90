from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from svdllm.common.errors import InputError
from svdllm.data import calibration_windows, check_source, evaluation_tokens
from svdllm.data.specs import NAMED_SETS, parse_spec, split_specs
from svdllm.data.windows import mixture_counts
from tokenizers_local import CHAT_TEMPLATE, byte_tokenizer

NUMBERS = " ".join(str(number) for number in range(2000))


def draw(source, tokenizer, samples=6, seqlen=16, seed=0, **settings):
    return calibration_windows(source, tokenizer, samples=samples, seqlen=seqlen, seed=seed, **settings)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def write_rows(path: Path, rows: list) -> str:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(path: Path, columns: dict) -> str:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def starts_of(window: list[int], stream: list[int]) -> list[int]:
    return [start for start in range(len(stream)) if stream[start : start + len(window)] == window]


@pytest.fixture
def numbers(tmp_path):
    return write(tmp_path / "numbers.txt", NUMBERS)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in which ``owner/name`` is found as a local repository, with every cache inside it."""
    import datasets.config

    monkeypatch.chdir(tmp_path)
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    return tmp_path


# ---- windows


def test_windows_are_slices_of_the_text_tokenised_as_a_whole(numbers, tokenizer):
    windows = draw(numbers, tokenizer, samples=20, seqlen=31)
    stream = tokenizer(NUMBERS)["input_ids"]
    assert windows.ids.shape == (20, 31)
    assert windows.ids.dtype == torch.int64
    assert windows.num_tokens == 620
    starts = [starts_of(window, stream) for window in windows.ids.tolist()]
    assert all(starts)
    assert len({start[0] for start in starts}) > 15


def test_starts_are_uniform_and_reach_both_ends(tokenizer):
    text = "0123456789"  # ten tokens, windows of 8: starts 0, 1, 2
    windows = draw([text], tokenizer, samples=3000, seqlen=8)
    firsts = tokenizer.convert_ids_to_tokens(windows.ids[:, 0])
    counts = [firsts.count(token) for token in "012"]
    assert sum(counts) == 3000
    assert all(900 < count < 1100 for count in counts)


def test_the_whole_text_is_a_window_of_its_own_length(tokenizer):
    ids = tokenizer("0123456789")["input_ids"]
    assert draw(["0123456789"], tokenizer, samples=2, seqlen=10).ids.tolist() == [ids, ids]


def test_the_seed_decides(numbers, tokenizer):
    first, again, other = (draw(numbers, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(first.ids, other.ids)
    assert first.fingerprint != other.fingerprint


def test_two_tokenizers_have_two_fingerprints(tokenizer):
    assert draw("python-docs", tokenizer).fingerprint != draw("python-docs", byte_tokenizer(270)).fingerprint


def test_fingerprint_is_of_ids_and_shape():
    ids = torch.arange(12)
    prints = {draw(ids.view(shape), None, *shape).fingerprint for shape in ((3, 4), (4, 3), (2, 6))}
    assert len(prints) == 3
    assert draw(ids.view(3, 4).int(), None, 3, 4).fingerprint == draw(ids.view(3, 4), None, 3, 4).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", prints.pop())


@pytest.mark.parametrize("spec", ["numbers.txt", "python-docs:1,numbers.txt:1"])
def test_global_random_state_is_neither_read_nor_changed(numbers, tokenizer, monkeypatch, spec):
    monkeypatch.chdir(Path(numbers).parent)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(spec, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draw(spec, tokenizer).fingerprint == first.fingerprint


def test_special_tokens_once_for_the_whole_stream(numbers):
    with_bos = byte_tokenizer(add_bos=True)
    ids = evaluation_tokens(numbers, with_bos)
    assert ids[0] == with_bos.bos_token_id
    assert (ids == with_bos.bos_token_id).sum() == 1
    assert len(ids) == len(byte_tokenizer()(NUMBERS)["input_ids"]) + 1


def test_long_texts_do_not_warn_and_logging_is_left_alone(numbers, caplog):
    fresh = byte_tokenizer(max_length=64)
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    handled = []
    handler = logging.Handler()
    handler.emit = handled.append
    logger.addHandler(handler)
    try:
        draw(numbers, fresh)
        assert handled == []
        fresh(NUMBERS)  # the warning exists, and is not used up
        assert "longer than the specified maximum sequence length" in handled[0].getMessage()
    finally:
        logger.removeHandler(handler)
    assert (logger.level, logger.propagate) == (level, propagate)


# ---- sources in memory


def test_list_of_texts_is_joined_by_an_empty_line(tokenizer):
    ids = evaluation_tokens(["one", "two"], tokenizer)
    assert tokenizer.decode(ids) == "one\n\ntwo"
    assert draw(["one", "two"], tokenizer, 1, len(ids)).ids[0].tolist() == ids.tolist()


def test_tensor_gives_its_first_windows():
    ids = torch.arange(40).view(5, 8)
    windows = draw(ids, None, samples=3, seqlen=6)
    assert torch.equal(windows.ids, ids[:3, :6])
    assert windows.source == "tensor 5 x 8"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, 8), "must be integers .* found torch.float32"),
        (torch.zeros(4, 8, dtype=torch.uint8), "must be integers of 16 bits or more .* found torch.uint8"),
        (torch.zeros(32, dtype=torch.int64), r"must be 2-D \(num_windows, seqlen\), found shape \(32,\)"),
        (torch.full((4, 8), -100), "must not be negative, found -100"),
        (torch.zeros(3, 8, dtype=torch.int64), "holds 3 windows of 8 tokens, needed are 4 of 8"),
        (torch.zeros(4, 7, dtype=torch.int64), "holds 4 windows of 7 tokens, needed are 4 of 8"),
    ],
)
def test_tensors_that_do_not_fit(ids, message):
    with pytest.raises(InputError, match=message):
        draw(ids, None, samples=4, seqlen=8)


def test_dataset_in_memory(tokenizer):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})
    check_source(dataset)
    assert tokenizer.decode(evaluation_tokens(dataset, tokenizer)) == "one\n\ntwo"
    assert draw(dataset, tokenizer, 1, 4).source == "datasets.Dataset of 2 rows:text"
    with pytest.raises(InputError, match="no column 'text' or 'messages', it has: id"):
        draw(dataset.remove_columns("text"), tokenizer)
    with pytest.raises(InputError, match="a dataset with splits train was given: choose one"):
        draw(datasets.DatasetDict({"train": dataset}), tokenizer)
    with pytest.raises(InputError, match=r"expected a datasets\.Dataset with rows, found IterableDataset"):
        draw(dataset.to_iterable_dataset(), tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list of texts is empty"),
        (["one", 2], "must hold str, item 1 is int"),
        (7, "a data source of type int: expected a spec"),
    ],
)
def test_sources_of_wrong_type(tokenizer, source, message):
    for act in (lambda: draw(source, tokenizer), lambda: evaluation_tokens(source, tokenizer)):
        with pytest.raises(InputError, match=message):
            act()


def test_evaluation_takes_no_tensor_and_no_mixture(tokenizer):
    with pytest.raises(InputError, match="found a tensor: hand it to perplexity directly"):
        evaluation_tokens(torch.zeros(2, 3, dtype=torch.int64), tokenizer)
    with pytest.raises(InputError, match="is a mixture, which has no perplexity of its own"):
        evaluation_tokens("python-docs:1,python-docs:1", tokenizer)


# ---- files


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".TXT"])
def test_plain_text_files_are_one_text(tmp_path, tokenizer, suffix):
    text = "zwei\r\nZeilen – und mehr\n\n"
    path = write(tmp_path / f"text{suffix}", text)
    assert tokenizer.decode(evaluation_tokens(path, tokenizer)) == text


def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    path = write(tmp_path / "mark.txt", b"\xef\xbb\xbfone")
    assert tokenizer.decode(evaluation_tokens(path, tokenizer)) == "one"


ROWS = [{"text": "one\u2028more", "other": "uno"}, {"text": "two", "other": "dos"}]


def rows_file(folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind.split()[0]}"
    if kind == "parquet":
        return write_parquet(path, {name: [row[name] for row in ROWS] for name in ROWS[0]})
    if kind == "json list":
        return write(path, json.dumps(ROWS, indent=1))
    return write(path, "\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")


@pytest.mark.parametrize("kind", ["jsonl", "json", "json list", "parquet"])
def test_rows_are_joined_by_an_empty_line(tmp_path, tokenizer, kind):
    path = rows_file(tmp_path, kind)
    assert tokenizer.decode(evaluation_tokens(path, tokenizer)) == "one\u2028more\n\ntwo"
    assert tokenizer.decode(evaluation_tokens(f"{path}:other", tokenizer)) == "uno\n\ndos"
    assert draw(f"{path}:other", tokenizer, 1, 4).source == f"{path}:other"
    with pytest.raises(InputError, match=r"has no column 'txt', it has: (other, text|text, other)"):
        evaluation_tokens(f"{path}:txt", tokenizer)


def test_an_existing_path_wins(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a:0.5,b:0.5.txt", "colons and commas")
    write(tmp_path / "x.jsonl:text.txt", "a colon")
    write_rows(tmp_path / "x.jsonl", ROWS)
    assert tokenizer.decode(evaluation_tokens("a:0.5,b:0.5.txt", tokenizer)) == "colons and commas"
    assert tokenizer.decode(evaluation_tokens("x.jsonl:text.txt", tokenizer)) == "a colon"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt is empty: give a file with text"),
        ("a.txt", " \n", r"a\.txt is empty"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.txt", b"abc\xe9d", r"a\.txt is not UTF-8: byte 0xe9 at position 3; convert it"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8: byte 0xff at position 10"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": \n',
            r"a\.jsonl, line 3: not valid JSON .* expected one object per line",
        ),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: expected an object .* found list"),
        ("a.jsonl", '{"text": "a"}\n{"texts": "b"}\n', r"a\.jsonl: row 1 has no column 'text', it has: texts"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', r"a\.jsonl:text, row 1: expected text \(str\), found int"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "row 1: expected text .* found NoneType"),
        ("a.jsonl", '{"text": {"a": 1}}\n', "row 0: expected text .* found dict"),
        ("a.jsonl", '{"text": ""}\n', "a.jsonl:text holds no text"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": [{"role": "user", "content": "b"}]}\n',
            "row 1: expected text .* found a list",
        ),
        ("a.jsonl", '{"text": ["a", "b"]}\n', "row 0: a message must have 'role' and 'content', found str"),
        ("a.jsonl", '{"text": [1, 2]}\n', "found int: token ids are taken from Python, as a tensor"),
        ("a.jsonl", '{"messages": "hello"}\n', "row 0: expected a list of at least one message, found str"),
        ("a.jsonl", '{"text": "cut \\ud83d"}\n', r"row 0: character 4 is '\\ud83d', half of a surrogate pair"),
        ("a.jsonl", '{"text": 1' + "0" * 5000 + "}\n", "a.jsonl, line 1: not valid JSON .*integer string"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl, line 1: not valid JSON .*recursion"),
        ("a.txt", '{"text": "one"}\n{"text": "two"}\n', r"holds rows in JSON, with text: rename it to a\.jsonl"),
        ("a.txt", '[\n{"messages": []}\n]', r"holds rows in JSON, with messages: rename it to a\.json$"),
        ("a.txt", b"one\0two", r"a\.txt is not text: byte 0x00 at position 3"),
        ("a.txt", "one".encode("utf-16"), r"is not UTF-8: byte 0xff at position 0; .* iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "one".encode("utf-16-le"), r"is not text: byte 0x00 at position 1\. .* iconv -f UTF-16"),
        (
            "a.json",
            '[{"text": "a"},\n {"text"}]',
            r"a\.json: not valid JSON \(.*line 2 .*\): expected a list of objects",
        ),
        ("a.json", "[]", r"a\.json is an empty list"),
        ("a.json", '["a"]', r"a\.json, row 0: expected an object .* found str"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a readable parquet file"),
        ("a.csv", "a,b", r"a\.csv: a file of kind '\.csv' cannot be read, expected \.txt"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    for act in (lambda: draw(path, tokenizer), lambda: evaluation_tokens(path, tokenizer)):
        with pytest.raises(InputError, match=message):
            act()


def test_brackets_and_keys_of_its_own_make_no_rows_of_a_text(tmp_path, tokenizer):
    for text in ('{"port": 80}\nand more', "[1] A note.", '["text"]', "{text}"):
        assert tokenizer.decode(evaluation_tokens(write(tmp_path / "a.txt", text), tokenizer)) == text


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"text": [b"one", b"two"]}, r"row 0: expected text \(str\), found bytes: decode the column to text"),
        ({"text": ["one", None]}, r"row 1: expected text \(str\), found NoneType: the row is empty, remove it"),
        ({"text": [1.5, 2.5]}, r"row 0: expected text \(str\), found float: name the column of text after a ':'"),
        ({"text": [{"a": "b"}]}, r"row 0: expected text \(str\), found dict"),
        ({"text": [["one", "two"]]}, "row 0: a message must have 'role' and 'content', found str"),
    ],
)
def test_columns_of_another_kind_than_text(tmp_path, tokenizer, column, message):
    datasets = pytest.importorskip("datasets")
    path = write_parquet(tmp_path / "a.parquet", column)
    for source in (path, datasets.Dataset.from_dict(column), datasets.Dataset.from_dict(column).with_format("numpy")):
        with pytest.raises(InputError, match=message if isinstance(source, str) else "row [01]: "):
            draw(source, tokenizer)


def test_a_parquet_file_that_is_damaged_within(tmp_path, tokenizer):
    path = Path(write_parquet(tmp_path / "a.parquet", {"text": [f"some text {n * n}" for n in range(2000)]}))
    data = bytearray(path.read_bytes())
    data[40:3000] = bytes(2960)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file .*: it may be cut short"):
        draw(str(path), tokenizer)


def test_a_row_that_the_tokenizer_cannot_take_is_named(tokenizer):
    class Strict:
        chat_template = None

        def __call__(self, text, **settings):
            if "é" in text:
                raise Exception("Encountered an unknown token")  # what tokenizers throws has no class of its own
            return tokenizer(text, **settings)

    with pytest.raises(
        InputError, match=r"list of 3 texts, row 1: the tokenizer cannot take .*\(Encountered an unknown"
    ):
        draw(["a cat", "a café", "a dog"], Strict())


def test_rows_that_a_data_set_cannot_read(tokenizer):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": ["one", ""]})
    lazy = dataset.with_transform(lambda rows: {"text": [text[0] + text for text in rows["text"]]})
    with pytest.raises(InputError, match=r"datasets\.Dataset of 2 rows:text cannot be read \(IndexError: string index"):
        evaluation_tokens(lazy, tokenizer)


def test_too_short_says_how_many_tokens_there_are(tmp_path, tokenizer):
    path = write(tmp_path / "short.txt", "0123456789")
    with pytest.raises(
        InputError, match=r"short\.txt holds 10 tokens, one window needs 11: lower seqlen to 10 or less"
    ):
        draw(path, tokenizer, seqlen=11)


@pytest.mark.parametrize("name", ["samples", "seqlen"])
def test_counts_below_one(tokenizer, name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, found 0"):
        draw(["text"], tokenizer, **{name: 0})


# ---- chats

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_go_through_the_template(tmp_path, kind):
    chatty = byte_tokenizer(add_bos=True, chat_template=CHAT_TEMPLATE)
    path = tmp_path / f"chat.{kind}"
    if kind == "parquet":
        write_parquet(path, {"messages": [CHAT, CHAT[:1]]})
    else:
        write_rows(path, [{"messages": CHAT}, {"messages": CHAT[:1]}])
    expected = "<bos>user: hi\n<bos>assistant: hello\n<bos>user: hi\n"
    ids = evaluation_tokens(str(path), chatty)
    assert chatty.decode(ids) == expected
    assert (ids == chatty.bos_token_id).sum() == 3  # the template's, none of the tokenizer's own
    assert torch.equal(evaluation_tokens(f"{path}:messages", chatty), ids)


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([CHAT], None, "row 0 is a chat, and the tokenizer has no chat template"),
        ([CHAT, "text"], CHAT_TEMPLATE, "row 1: expected a list of at least one message, found str"),
        ([CHAT, []], CHAT_TEMPLATE, "row 1: expected a list of at least one message, found an empty list"),
        ([["hi"]], CHAT_TEMPLATE, "row 0: a message must have 'role' and 'content', found str"),
        (
            [[{"from": "user", "value": "hi"}]],
            CHAT_TEMPLATE,
            "must have 'role' and 'content', found an object with from",
        ),
        (
            [CHAT],
            "{{ raise_exception('odd roles') }}",
            r"row 0: the tokenizer's chat template refuses the messages \(odd roles\)$",
        ),
    ],
)
def test_chats_that_cannot_be_used(tmp_path, rows, template, message):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": row} for row in rows])
    with pytest.raises(InputError, match=message):
        draw(path, byte_tokenizer(chat_template=template))


# ---- names and mixtures


def test_python_docs_needs_nothing_and_keeps_evaluation_apart(tokenizer):
    from pydoc_data.topics import topics

    names = sorted(topics)
    evaluation = tokenizer.decode(evaluation_tokens("python-docs", tokenizer))
    assert evaluation == "\n\n".join(topics[name] for name in names[4::5])
    windows = draw("python-docs", tokenizer, samples=30, seqlen=200)
    calibration = "\n\n".join(topics[name] for position, name in enumerate(names) if position % 5 != 4)
    for text in tokenizer.batch_decode(windows.ids):
        assert text.strip("\ufffd") in calibration
        assert text.strip("\ufffd") not in evaluation
    assert "python-docs" in windows.source


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [
        ([0.7, 0.3], 10, [7, 3]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [4, 3, 3]),
        ([0.5, 0.5], 5, [3, 2]),
        ([0.45, 0.45, 0.1], 4, [2, 2, 0]),
        ([0.2, 0.8], 1, [0, 1]),
    ],
)
def test_mixture_counts_by_hand(weights, total, counts):
    assert mixture_counts(weights, total) == counts


def test_mixture_counts_are_within_one_of_their_share():
    generator = torch.Generator().manual_seed(0)
    for total in range(1, 60):
        weights = torch.rand(5, generator=generator, dtype=torch.float64)
        shares = (weights / weights.sum()).tolist()
        counts = mixture_counts(shares, total)
        assert sum(counts) == total
        assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))


def test_mixture_draws_each_part_by_itself(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "digits.txt", "0123456789" * 30)
    write_rows(tmp_path / "letters.jsonl", [{"body": "qxzwvkjyp" * 40}])
    windows = draw("digits.txt:6, letters.jsonl:body:2", tokenizer, samples=8)
    texts = tokenizer.batch_decode(windows.ids)
    assert [text.isdigit() for text in texts] == [True] * 6 + [False] * 2
    assert windows.source == "6 x digits.txt + 2 x letters.jsonl:body"
    # the first part keeps its draw whatever the second is, and two equal parts draw differently
    twice = draw("digits.txt:6,digits.txt:6", tokenizer, samples=12)
    assert torch.equal(twice.ids[:6], windows.ids[:6])
    assert not torch.equal(twice.ids[:6], twice.ids[6:])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikitxt2", "unknown data set 'wikitxt2', did you mean 'wikitext2'"),
        ("WikiText-2", "did you mean 'wikitext2'"),
        ("qqqqqq", "unknown data set 'qqqqqq': expected one of python-docs, wikitext2, ptb, c4, a file"),
        ("missing.txt", "file not found: missing.txt"),
        ("missing.jsonl:text", "file not found: missing.jsonl "),
        ("./missing", "file not found: ./missing"),
        ("a/b/c", "file not found: a/b/c"),
        ("", "the data source is empty"),
        ("one\ntwo", "looks like text, not like a name or a file: give texts as a list of str"),
        ("x" * 300, "looks like text, not like a name or a file"),
        ("owner/name:a:b:c:d", "has 5 parts, expected at most 4"),
        ("owner/na me", "'owner/na me' is not the name of a hub dataset"),
        ("python-docs:0.5", "'python-docs' is a fixed set and takes no ':0.5'"),
        ("real.txt:text", "real.txt is plain text and has no field ':text'"),
        ("real.jsonl:", "the field after ':' is empty"),
        ("real.txt,python-docs", "the part 'real.txt' of the mixture .* has no weight"),
        ("real.txt:0.5,python-docs", "the part 'python-docs' of the mixture .* has no weight"),
        ("real.jsonl:text,python-docs:1", "the weight 'text' of the part 'real.jsonl:text' is not a number"),
        ("python-docs:1,real.txt:0", "the weight 0 of the part 'real.txt:0' is not positive"),
        ("python-docs:1,real.txt:-0.5", "the weight -0.5 .* is not positive"),
        ("python-docs:1,real.txt:nan", "the weight nan .* is not positive"),
        ("python-docs:1,missing.txt:1", "file not found: missing.txt"),
    ],
)
def test_specs_that_are_refused_before_anything_is_read(tmp_path, tokenizer, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "real.txt", "")
    write(tmp_path / "real.jsonl", "")
    for act in (lambda: check_source(spec), lambda: draw(spec, tokenizer)):
        with pytest.raises(InputError, match=message):
            act()


def test_check_source_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "broken.jsonl", b"\xff")
    for spec in (
        "broken.jsonl",
        "broken.jsonl:text",
        "python-docs:1,broken.jsonl:2",
        "owner/name::train[:10]",
        *NAMED_SETS,
    ):
        check_source(spec)


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ("wikitext2", "datasets"),
        ("owner/name", "datasets"),
        ("rows.parquet", "pyarrow"),
        ("python-docs:1,c4:1", "datasets"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, tokenizer, monkeypatch, spec, package):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.parquet", "")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    for act in (lambda: check_source(spec), lambda: draw(spec, tokenizer)):
        with pytest.raises(InputError, match=rf"needs the package '{package}': pip install 'svdllm\[data\]'"):
            act()
    assert draw("rows.jsonl", tokenizer, 1, 4).num_tokens == 4  # what does not need it works


# ---- the hub, as local repositories

CONFIGS = """---
configs:
- config_name: {name}
  data_files:
  - split: train
    path: {name}/train.jsonl
  - split: test
    path: {name}/test.jsonl
---
"""


def test_wikitext2_protocol(hub, tokenizer):
    name = "wikitext-2-raw-v1"
    write(hub / "Salesforce/wikitext/README.md", CONFIGS.format(name=name))
    write_rows(hub / f"Salesforce/wikitext/{name}/train.jsonl", [{"text": "train"}, {"text": ""}, {"text": "more"}])
    write_rows(hub / f"Salesforce/wikitext/{name}/test.jsonl", [{"text": ""}, {"text": "test"}, {"text": "end"}])
    assert tokenizer.decode(evaluation_tokens("wikitext2", tokenizer)) == "\n\ntest\n\nend"
    length = len(tokenizer("train\n\n\n\nmore")["input_ids"])
    windows = draw("wikitext2", tokenizer, 1, length)
    assert tokenizer.decode(windows.ids[0]) == "train\n\n\n\nmore"
    assert windows.source == f"Salesforce/wikitext:{name}:train:text"


def test_ptb_protocol(hub, tokenizer):
    for split, words in (("train", ["a b", "c"]), ("test", ["d", "e f"])):
        write_parquet(hub / f"ptb-text-only/ptb_text_only/penn_treebank/{split}/0000.parquet", {"sentence": words})
    assert tokenizer.decode(evaluation_tokens("ptb", tokenizer)) == "d e f"
    assert tokenizer.decode(draw("ptb", tokenizer, 1, len(tokenizer("a b c")["input_ids"])).ids[0]) == "a b c"


def c4_file(hub: Path, name: str, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts)
    write(hub / "allenai/c4/en" / name, gzip.compress(lines.encode()))


def test_c4_draws_inside_documents_longer_than_a_window(hub, tokenizer):
    texts = [chr(ord("A") + index) * (3 + 2 * index) for index in range(12)]  # one letter each, 3 to 25 tokens
    c4_file(hub, "c4-train.00000-of-01024.json.gz", texts)
    windows = draw("c4", tokenizer, samples=40, seqlen=15)
    decoded = tokenizer.batch_decode(windows.ids)
    assert all(len(set(text)) == 1 for text in decoded)  # never across two documents
    allowed = {text[0] for text in texts if len(text) > 15}
    assert {text[0] for text in decoded[: len(allowed)]} == allowed  # none repeated before all were used
    assert torch.equal(windows.ids, draw("c4", tokenizer, samples=40, seqlen=15).ids)
    with pytest.raises(InputError, match=r"no document of .*c4.* the longest has 25 tokens, needed are more than 25"):
        draw("c4", tokenizer, seqlen=25)


def test_c4_windows_start_anywhere_in_the_document(hub, tokenizer):
    c4_file(hub, "c4-train.00000-of-01024.json.gz", ["0123456789"])
    windows = draw("c4", tokenizer, samples=300, seqlen=8)
    counts = [tokenizer.convert_ids_to_tokens(windows.ids[:, 0]).count(token) for token in "012"]
    assert sum(counts) == 300
    assert min(counts) > 60


def test_c4_evaluation_takes_1100_documents(hub, tokenizer):
    c4_file(hub, "c4-validation.00000-of-00008.json.gz", [str(index) for index in range(1200)])
    assert tokenizer.decode(evaluation_tokens("c4", tokenizer)) == " ".join(str(index) for index in range(1100))


def test_hub_specs_name_config_split_and_field(hub, tokenizer):
    write(hub / "owner/name/README.md", CONFIGS.format(name="big"))
    for split in ("train", "test"):
        write_rows(
            hub / f"owner/name/big/{split}.jsonl", [{"text": f"{split} {n}", "body": f"body {n}"} for n in range(4)]
        )

    def text(spec):
        return tokenizer.decode(evaluation_tokens(spec, tokenizer))

    assert text("owner/name") == "test 0\n\ntest 1\n\ntest 2\n\ntest 3"
    assert text("owner/name:big:train[:2]:body") == "body 0\n\nbody 1"
    assert text("owner/name::train[1:2]") == "train 1"
    assert text(f"{hub}/owner/name::train[:1]") == "train 0"
    assert draw("owner/name", tokenizer, 1, 4).source == "owner/name:train:text"
    with pytest.raises(InputError, match=r"owner/name, config default, split dev cannot be loaded \(Unknown split"):
        text("owner/name::dev")
    with pytest.raises(InputError, match=r"owner/name, config small, split test cannot be loaded .*small"):
        text("owner/name:small")
    with pytest.raises(InputError, match="no column 'txt', it has: text, body"):
        text("owner/name:::txt")


@pytest.mark.parametrize("environment_is_offline", [True, False])
def test_offline_makes_no_call_and_says_what_to_do(hub, tokenizer, monkeypatch, no_network, environment_is_offline):
    import datasets.config
    import huggingface_hub.constants

    holders = (datasets.config, huggingface_hub.constants)
    for holder in holders:
        monkeypatch.setattr(holder, "HF_HUB_OFFLINE", environment_is_offline)
    for spec in ("owner/nowhere", "wikitext2", "c4", "ptb"):
        with pytest.raises(
            InputError, match=r"is not in the local cache, and offline mode is on: run once .* python-docs"
        ):
            draw(spec, tokenizer, offline=True)
    assert no_network == []
    assert [holder.HF_HUB_OFFLINE for holder in holders] == [environment_is_offline] * 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("ConnectionError", r"owner/name cannot be reached on the hub .* \(no route\): run once with a network"),
        ("DatasetNotFoundError", r"owner/name does not exist on the hub .* \(no route\): check the name"),
        ("RuntimeError", "owner/name, config default, split train cannot be loaded .no route.$"),
    ],
)
def test_a_hub_that_refuses_is_named(hub, tokenizer, monkeypatch, kind, message):
    import datasets.exceptions

    errors = {
        error.__name__: error for error in (ConnectionError, datasets.exceptions.DatasetNotFoundError, RuntimeError)
    }

    def refuse(*_, **__):
        raise errors[kind]("no route\nand more")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(InputError, match=message):
        draw("owner/name", tokenizer)


def test_named_sets_ask_the_hub_for_what_the_papers_use(hub, tokenizer, monkeypatch):
    asked = []

    def record(*arguments, **settings):
        asked.append((*arguments, *settings.values()))
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", record)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", record)
    for name in ("wikitext2", "c4", "ptb"):
        for act in (draw, evaluation_tokens):
            with pytest.raises(InputError):
                act(name, tokenizer)
    ptb = ("ptb-text-only/ptb_text_only", "dataset", "refs/convert/parquet")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "dataset", None),
        ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "dataset", None),
        (ptb[0], "penn_treebank/train/0000.parquet", *ptb[1:]),
        (ptb[0], "penn_treebank/test/0000.parquet", *ptb[1:]),
    ]


@pytest.mark.parametrize("offline", [True, False])
def test_cached_files_are_found_without_a_network(hub, tokenizer, no_network, offline):
    commit = "0" * 40
    for repo, reference, name, content in (
        ("allenai--c4", "main", "en/c4-train.00000-of-01024.json.gz", gzip.compress(b'{"text": "0123456789"}')),
        ("ptb-text-only--ptb_text_only", "refs/convert/parquet", "penn_treebank/train/0000.parquet", None),
    ):
        folder = hub / f"cache/hub/datasets--{repo}"
        write(folder / "refs" / reference, commit)
        if content is None:
            write_parquet(folder / "snapshots" / commit / name, {"sentence": ["0123", "456789"]})
        else:
            write(folder / "snapshots" / commit / name, content)
    assert draw("c4", tokenizer, 2, 8, offline=offline).num_tokens == 16
    assert draw("ptb", tokenizer, 2, 8, offline=offline).num_tokens == 16
    assert no_network == []


def test_importing_does_not_import_the_extras():
    import subprocess

    # Older versions of transformers import scikit-learn, which imports pyarrow.
    code = (
        "import sys; from transformers import AutoModelForCausalLM; before = set(sys.modules)\n"
        "import svdllm.data; print(sorted({'datasets', 'pyarrow'} & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_parsed_mixture_is_normalised(tmp_path):
    parts = parse_spec("python-docs:3,python-docs:1").parts
    assert [weight for _, _, weight in parts] == [0.75, 0.25]


def test_several_sources_in_one_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b.jsonl").write_text("{}")
    assert split_specs(["wikitext2,c4", " ptb"]) == ["wikitext2", "c4", "ptb"]
    assert split_specs(["c4", "python-docs, c4"]) == ["c4", "python-docs"]
    assert split_specs(["a,b.jsonl", "a,b.jsonl:text"]) == ["a,b.jsonl", "a,b.jsonl:text"]
    assert split_specs(["wikitext2:0.7,c4:.3", "owner/name::test[:5],c4"]) == [
        "wikitext2:0.7,c4:.3",
        "owner/name::test[:5]",
        "c4",
    ]
    assert split_specs(["c4,"]) == ["c4", ""]
