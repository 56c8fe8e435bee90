from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from families import tiny_model
from svdllm.common.errors import InputError, NumericalError
from svdllm.data import evaluation_tokens
from svdllm.evaluation import perplexity as evaluate
from svdllm.evaluation.perplexity import perplexity
from svdllm.evaluation.windows import prefix_token
from tokenizers_local import byte_tokenizer

VOCABULARY = 50


class TableModel(nn.Module):
    """Logits of the next token are a row of a table, chosen by the current token alone."""

    def __init__(self, table_VV: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table_VV)
        self.dropout = nn.Dropout(0.5)
        self.batch_shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids, **_):
        self.batch_shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double()
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def random_ids(count: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(7))


def brute_force(model, ids: torch.Tensor, seqlen: int) -> list[list[float]]:
    """The loss of every predicted token by running each prefix by itself: no masks, no batches, no shifts."""
    model.eval()
    losses = []
    for first in range(0, len(ids) - seqlen + 1, seqlen):
        window = ids[first : first + seqlen]
        losses.append([])
        for end in range(1, seqlen):
            with torch.no_grad():
                logits = model(input_ids=window[None, :end]).logits[0, -1].double()
            losses[-1].append((logits.logsumexp(0) - logits[window[end]]).item())
    return losses


def test_agrees_with_one_prefix_at_a_time(llama):
    ids = random_ids(47)
    result = perplexity(llama, ids, seqlen=9, batch_size=2)
    losses = brute_force(llama, ids, 9)
    flat = [loss for window in losses for loss in window]
    assert len(losses) == 5
    assert result.num_windows == 5
    assert result.num_tokens == len(flat) == 40
    assert result.mean_nll == pytest.approx(math.fsum(flat) / len(flat), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-6)
    assert result.perplexity > VOCABULARY / 2
    assert result.window_nll == pytest.approx([math.fsum(window) / len(window) for window in losses], rel=1e-6)
    assert "window_nll" not in result.to_dict()


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    result = perplexity(TableModel(torch.zeros(37, 37)), random_ids(60, 37), seqlen=10)
    assert result.perplexity == pytest.approx(37, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-6)


def test_sure_and_right_is_one_and_the_prediction_is_the_next_token():
    following = torch.eye(5).roll(1, dims=1) * 1000.0  # token k is followed by k + 1
    assert perplexity(TableModel(following), torch.arange(20) % 5, seqlen=10).perplexity == 1.0


def test_standard_error_of_two_windows_by_hand():
    # token 0 predicts (1/2, 1/2); token 1 predicts (3/4, 1/4)
    model = TableModel(torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log())
    ids = torch.tensor([0, 0, 1, 1, 1, 0])  # losses: ln 2, ln 2 | ln 4, ln 4/3
    first, second = math.log(2), (math.log(4) + math.log(4 / 3)) / 2
    mean = (first + second) / 2
    error_of_mean = abs(first - second) / 2  # std of two numbers is |a - b| / sqrt 2, over sqrt 2 windows
    result = perplexity(model, ids, seqlen=3)
    assert result.mean_nll == pytest.approx(mean, rel=1e-6)
    assert result.stderr == pytest.approx(math.exp(mean) * error_of_mean, rel=1e-5)


def test_one_window_has_no_standard_error(llama):
    assert perplexity(llama, random_ids(12), seqlen=10).stderr is None


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCABULARY, 9 * VOCABULARY, 2**25])
def test_batches_and_chunks_change_nothing(llama, monkeypatch, batch_size, chunk_elements):
    expected = perplexity(llama, random_ids(47), seqlen=9, batch_size=1)
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", chunk_elements)
    result = perplexity(llama, random_ids(47), seqlen=9, batch_size=batch_size)
    assert result.mean_nll == pytest.approx(expected.mean_nll, rel=1e-6)
    assert result.stderr == pytest.approx(expected.stderr, rel=1e-4)


def test_windows_and_streams_agree(llama):
    ids = random_ids(45)
    stream = perplexity(llama, ids, seqlen=9)
    assert perplexity(llama, ids[None], seqlen=9).mean_nll == stream.mean_nll
    windows = perplexity(llama, ids.view(5, 9).int(), seqlen=9)
    assert windows.mean_nll == stream.mean_nll
    assert "without overlap, the remainder dropped; 5 of 5 windows, 8 predictions each" in stream.description
    assert windows.description.startswith("windows of 9 tokens as given")
    assert stream.protocol == windows.protocol == "windows"


def test_max_windows_takes_the_first(llama):
    ids = random_ids(45)
    part = perplexity(llama, ids, seqlen=9, max_windows=2)
    assert part.mean_nll == pytest.approx(perplexity(llama, ids[:18], seqlen=9).mean_nll, rel=1e-12)
    assert "2 of 5 windows" in part.description


def test_default_batch_holds_about_two_thousand_tokens():
    model = TableModel(torch.zeros(3, 3))
    perplexity(model, torch.zeros(5000, dtype=torch.int64), seqlen=500)
    perplexity(model, torch.zeros(5000, dtype=torch.int64), seqlen=5000)
    assert model.batch_shapes == [(4, 500), (4, 500), (2, 500), (1, 5000)]


def test_modes_are_put_back_and_dropout_is_off():
    model = TableModel(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    model.train()
    model.dropout.eval()
    expected = perplexity(model, random_ids(20, 5), seqlen=5).mean_nll
    assert model.training
    assert not model.dropout.training
    model.train()
    assert perplexity(model, random_ids(20, 5), seqlen=5).mean_nll == expected
    assert model.dropout.training
    assert model.table.grad is None


def test_modes_are_put_back_after_an_error():
    model = TableModel(torch.full((5, 5), torch.nan)).train()
    with pytest.raises(NumericalError):
        perplexity(model, random_ids(20, 5), seqlen=5)
    assert model.training
    assert model.dropout.training


def test_progress_counts_windows(llama):
    seen = []
    perplexity(llama, random_ids(47), seqlen=9, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_record_goes_into_json(llama):
    result = perplexity(llama, random_ids(20), seqlen=10, source="somewhere")
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.source == "somewhere"
    assert result.seqlen == 10
    assert result.seconds > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("chunk_elements", [1, 2**25])
def test_a_logit_that_is_not_finite_is_named(monkeypatch, bad, chunk_elements):
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", chunk_elements)
    table = torch.zeros(5, 5)
    table[4, 2] = bad
    ids = torch.zeros(30, dtype=torch.int64)
    ids[28] = 4  # window 5, the second of its batch, position 3
    with pytest.raises(NumericalError, match="a logit of window 5 is not finite, first at position 3"):
        perplexity(TableModel(table), ids, seqlen=5, batch_size=4)


def test_not_finite_at_the_last_position_is_seen_too():
    table = torch.zeros(5, 5)
    table[4] = torch.nan
    with pytest.raises(NumericalError, match="window 0 is not finite, first at position 2"):
        perplexity(TableModel(table), torch.tensor([0, 0, 4]), seqlen=3)


def test_too_short_names_both_counts(llama):
    with pytest.raises(InputError, match="the text has 9 tokens, one window needs 10"):
        perplexity(llama, random_ids(9), seqlen=10)


def test_beyond_the_context(llama):
    with pytest.raises(InputError, match="seqlen 33 is beyond the model's context of 32 tokens"):
        perplexity(llama, random_ids(40), seqlen=33)


def test_a_tokenizer_that_does_not_fit(llama):
    with pytest.raises(InputError, match="token id 50 is beyond the model's vocabulary of 50"):
        perplexity(llama, torch.full((20,), 50), seqlen=10)


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        (torch.zeros(20), {}, "must be integers, found torch.float32"),
        (torch.zeros(2, 2, 5, dtype=torch.int64), {}, r"1-D or 2-D, found shape \(2, 2, 5\)"),
        (torch.zeros(2, 9, dtype=torch.int64), {}, "9 tokens long, seqlen is 5"),
        (torch.full((20,), -100), {}, "must not be negative, found -100"),
        (torch.zeros(20, dtype=torch.int64), {"seqlen": 1}, "seqlen must be at least 2 to predict anything, found 1"),
        (torch.zeros(20, dtype=torch.int64), {"seqlen": 0, "protocol": "rolling"}, "at least 1 to predict anything"),
        (torch.zeros(20, dtype=torch.int64), {"protocol": "strided"}, "unknown protocol 'strided': expected one of w"),
        (torch.zeros(20, dtype=torch.int64), {"protocol": "rolling"}, "has neither BOS nor EOS"),
        (torch.zeros(0, dtype=torch.int64), {"protocol": "rolling", "prefix_token_id": 1}, "the text has no tokens"),
        (torch.zeros(4, 5, dtype=torch.int64), {"protocol": "rolling"}, "one stream of tokens, found windows"),
        (torch.zeros(20, dtype=torch.int64), {"batch_size": 0}, "batch_size must be at least 1, found 0"),
        (torch.zeros(20, dtype=torch.int64), {"max_windows": 0}, "max_windows must be at least 1, found 0"),
    ],
)
def test_wrong_arguments(llama, ids, settings, message):
    with pytest.raises(InputError, match=message):
        perplexity(llama, ids, **{"seqlen": 5, **settings})


def all_prefixes(model, ids: torch.Tensor, prefix: int, seqlen: int) -> list[float]:
    """The loss of every token given the tokens before it in its window of lm-evaluation-harness, one at a time."""
    text = torch.cat([torch.tensor([prefix]), ids])
    losses = []
    for index in range(1, len(text)):
        first = (index - 1) // seqlen * seqlen
        if first + seqlen > len(ids):
            first = max(len(ids) - seqlen, 0)  # the last window reads on from where it is full
        with torch.no_grad():
            logits = model(input_ids=text[None, first:index]).logits[0, -1].double()
        losses.append((logits.logsumexp(0) - logits[text[index]]).item())
    return losses


@pytest.mark.parametrize("length", [5, 18, 22])
def test_rolling_predicts_every_token_once(llama, length):
    ids = random_ids(length)
    found = perplexity(llama, ids, seqlen=9, protocol="rolling", prefix_token_id=3, batch_size=2)
    losses = all_prefixes(llama, ids, 3, 9)
    assert found.num_tokens == len(losses) == length
    assert found.num_windows == math.ceil(length / 9)
    assert found.mean_nll == pytest.approx(math.fsum(losses) / length, rel=1e-6)
    assert found.protocol == "rolling"
    assert "the first from token 3" in found.description


def test_the_protocols_agree_on_one_window_that_begins_with_the_prefix(llama):
    ids = random_ids(17)
    rolling = perplexity(llama, ids, seqlen=17, protocol="rolling", prefix_token_id=3)
    windows = perplexity(llama, torch.cat([torch.tensor([3]), ids]), seqlen=18, prefix_token_id=3)
    assert windows.begins_with_bos
    assert windows.num_tokens == rolling.num_tokens == 17
    assert windows.mean_nll == pytest.approx(rolling.mean_nll, rel=1e-9)


def test_standard_error_of_windows_of_unequal_size_by_hand():
    model = TableModel(torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log())
    ids = torch.tensor([0, 1, 1])  # from prefix 1: ln 4/3, ln 2 | ln 4 alone
    first, second = math.log(4 / 3) + math.log(2), math.log(4)
    mean = (first + second) / 3
    residuals = first - 2 * mean, second - mean
    error = math.sqrt(2 / 1 * (residuals[0] ** 2 + residuals[1] ** 2)) / 3
    found = perplexity(model, ids, seqlen=2, protocol="rolling", prefix_token_id=1)
    assert found.mean_nll == pytest.approx(mean, rel=1e-6)
    assert found.stderr == pytest.approx(math.exp(mean) * error, rel=1e-5)


def test_the_record_says_whether_the_text_begins_with_bos(llama):
    ids = random_ids(20)
    begins = int(ids[0])
    assert perplexity(llama, ids, seqlen=9).begins_with_bos is None
    assert perplexity(llama, ids, seqlen=9, prefix_token_id=begins).begins_with_bos is True
    without = perplexity(llama, ids, seqlen=9, prefix_token_id=begins + 1)
    assert without.begins_with_bos is False
    assert "the tokenizer put no BOS at the start" in without.description
    assert perplexity(llama, ids.view(2, 10), seqlen=10, prefix_token_id=begins).begins_with_bos is None


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("seqlen", [16, 61])
def test_rolling_is_that_of_lm_evaluation_harness(add_bos, seqlen):
    """On one text the sum of log likelihoods is ``HFLM.loglikelihood_rolling``'s."""
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'eval'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = byte_tokenizer(add_bos=add_bos)
    model = tiny_model("llama", vocab_size=300)
    text = "the quick brown fox jumps over the lazy dog and keeps a rank in another matrix"
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=seqlen)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (expected,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    ids = evaluation_tokens([text], tokenizer)
    found = perplexity(model, ids, seqlen=seqlen, protocol="rolling", prefix_token_id=prefix_token(tokenizer))
    assert len(ids) % seqlen
    assert found.begins_with_bos is add_bos
    assert -found.mean_nll * found.num_tokens == pytest.approx(expected, abs=1e-4)


def test_a_model_in_bfloat16_is_judged_in_float32():
    """Its logits are taken as they are, and nothing after them is rounded to three digits."""
    table = 4 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3))
    model, ids = TableModel(table.to(torch.bfloat16)), random_ids(60)
    result = perplexity(model, ids, seqlen=20)
    losses = [loss for window in brute_force(model, ids, 20) for loss in window]
    assert result.mean_nll == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)


def test_long_windows_are_summed_in_float64():
    """One loss of 2^24 and 300 of ln 2, whose float32 sum is off in the ninth digit: beyond 2^24 it counts in twos."""
    model = TableModel(torch.tensor([[0.0, -float(2**24)], [0.0, 0.0]]))
    ids = torch.tensor([0] + 301 * [1])
    result = perplexity(model, ids, seqlen=len(ids))
    half = torch.tensor(2.0).log().item()
    assert result.num_tokens == 301
    assert result.mean_nll == pytest.approx((2**24 + 300 * half) / 301, rel=1e-12)
