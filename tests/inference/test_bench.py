"""Speed and memory: the arithmetic, the order of the turns, the accounting, the records. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES, low_rank_model, stored_ranks, tiny_config, tiny_model, tiny_tokens
from mixed import COLUMNS, ROWS, mixed_model, model_with
from runs import run, save_dense
from svdllm.cli import main
from svdllm.common.errors import InputError, ResourceError, UnsupportedModelError
from svdllm.common.memory import parameter_bytes
from svdllm.common.progress import Reporter
from svdllm.inference.bench import BenchSettings, Spread, benchmark, benchmark_loaded, ideal, measure, memory, shape_of
from svdllm.inference.bench.forward import decode, prefill
from svdllm.inference.bench.measure import measure_cell, order_of_turns
from svdllm.inference.bench.memory import cache_bytes, measure_memory
from svdllm.inference.bench.plots import memory_figure, throughput_figure
from svdllm.inference.bench.records import CellRecord, PhaseRecord
from svdllm.inference.bench.roofline import CachedLayer, ModelShape
from svdllm.inference.cache_names import cache_of
from svdllm.models.skeleton import build_skeleton

QUICK: dict[str, Any] = {"batch_sizes": (1, 2), "prompts": (4, 6), "gen": 3, "repeats": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "small").output_dir


def layer(**sizes: Any) -> CachedLayer:
    return CachedLayer(**{"query_heads": 4, "head_features": 16, "token_bytes": 2 * 16 * 2, "window": None} | sizes)


def shape(**sizes: Any) -> ModelShape:
    given = {"block_linears": 1000, "other_linears": 10, "head": 300, "read_bytes": 2700, "widest_bytes": 80}
    return ModelShape(**given | {"last_logits": True, "layers": (layer(), layer(window=3))} | sizes)


# The ideal, by hand


def test_operations_of_a_prefill_by_hand() -> None:
    # Pairs of queries and keys in 5 tokens: 1 + 2 + 3 + 4 + 5 = 15, in a window of three 1 + 2 + 3 + 3 + 3 = 12.
    attention = 2 * 4 * 16 * (15 + 12)
    assert shape().prefill_operations(batch=3, prompt=5) == 3 * (2 * (5 * 1010 + 300) + attention)
    assert shape(last_logits=False).prefill_operations(3, 5) == 3 * (2 * (5 * 1010 + 5 * 300) + attention)


def test_bytes_of_a_decode_step_by_hand() -> None:
    # Two steps after 4 tokens see 5 and 6 keys, in a window of three 3 and 3; a token has 2 heads of 16 numbers.
    assert shape().decode_bytes(batch=3, prompt=4, gen=2) == 2700 + 3 * (2 * 16 * 2) * (5 + 6 + 3 + 3) / 2
    assert shape().cache_bytes(batch=3, tokens=6) == 3 * (2 * 16 * 2) * (6 + 3)


def test_ideals_by_hand() -> None:
    small = shape(block_linears=500, read_bytes=1700)
    found = ideal("prefill", shape(), small, batch=2, prompt=1, gen=4)
    assert found.linears == 2
    assert found.model == (2 * 1310 + 2 * 128) / (2 * 810 + 2 * 128)
    found = ideal("decode", shape(layers=()), shape(layers=(), read_bytes=1700), batch=2, prompt=1, gen=4)
    assert found.model == 2700 / 1700


# The ideal, against torch's own counter and the caches of real classes


def counted_operations(model: Any, ids: torch.Tensor) -> int:
    """What torch counts in a prefill with plain matrix products, the angles of the rotation apart."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    rotation = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotation


def mixed_with(family: str, **overrides: Any) -> Any:
    return mixed_model(family, overrides=overrides)


@pytest.mark.parametrize("make", [tiny_model, low_rank_model, mixed_with])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "qwen3"])
def test_operations_are_those_that_torch_counts(family: str, make: Any) -> None:
    model = make(family, attn_implementation="eager")
    found, (batch, prompt) = shape_of(model), (2, 12)
    # Plain products compute what the causal mask then hides: all 144 pairs instead of 78.
    hidden = sum(2 * one.query_heads * one.head_features for one in found.layers) * (144 - 78)
    expected = counted_operations(model, tiny_tokens(batch, prompt))
    assert found.prefill_operations(batch, prompt) + batch * hidden == expected


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gemma4_text"}))
def test_caches_are_as_large_as_their_formula(family: str) -> None:
    model, ids = tiny_model(family), tiny_tokens(3, 20)
    found = shape_of(model)
    for prompt in (2, 7, 13):
        cache = decode(model, prefill(model, ids[:, :prompt]), ids[:, prompt:])
        assert cache_bytes(cache) == found.cache_bytes(3, 20)


def test_a_cache_that_layers_share_has_no_formula() -> None:
    with pytest.raises(UnsupportedModelError, match="Gemma4ForCausalLM keeps no keys and values by layer"):
        shape_of(tiny_model("gemma4_text"))


def test_cache_of_grouped_queries_and_a_window_by_hand() -> None:
    # Keys and values, layers, sequences, heads, features of a head, tokens, bytes
    assert shape_of(tiny_model("llama")).cache_bytes(3, 20) == 2 * 2 * 3 * 2 * 8 * 20 * 4
    assert shape_of(tiny_model("gemma3_text")).cache_bytes(3, 20) == 2 * 3 * 2 * 16 * (20 + 8) * 4


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_head_and_not_the_embeddings(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    embeddings = 128 * 32
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    read = model.num_parameters() - (0 if tied else embeddings)
    assert shape_of(model).read_bytes == 4 * read
    assert parameter_bytes(model) == 4 * model.num_parameters()


def test_linears_of_a_low_rank_model_are_its_factors() -> None:
    model = low_rank_model("gpt2", dense=("c_attn",))
    factors = sum(p.numel() for name, p in model.named_parameters() if ".svd_" in name and name.endswith("weight"))
    left = sum(p.numel() for name, p in model.named_parameters() if name.endswith("c_attn.weight"))
    assert shape_of(model).block_linears == factors + left
    assert shape_of(model).head == 128 * 32


def test_a_model_without_keys_and_values_is_refused() -> None:
    model = tiny_model("llama")
    model.forward = lambda **_: SimpleNamespace(past_key_values=None)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM keeps no keys and values by layer"):
        shape_of(model)


# Steps and memory


def test_prompt_and_steps_fill_the_cache_of_one_pass() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(2, 12)
    cache = decode(model, prefill(model, ids[:, :7]), ids[:, 7:])
    with torch.no_grad():
        whole = cache_of(model(input_ids=ids, use_cache=True))
    for stepped, once in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(stepped.keys, once.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stepped.values, once.values, atol=1e-5, rtol=1e-5)


def test_a_prefill_makes_the_last_logits_only() -> None:
    model, shapes = tiny_model("llama"), []
    model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(tuple(logits.shape)))
    decode(model, prefill(model, tiny_tokens(2, 7)), tiny_tokens(2, 3))
    assert shapes == [(2, 1, 128)] * 4


class Toy:
    """A "model" that needs what it is told: kilobytes that stay, and kilobytes for a while."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> Any:
        tokens = input_ids.shape[1]
        passing = [torch.empty(1024 * tokens, dtype=torch.uint8) for _ in range(5)]
        del passing
        kept = torch.empty(256 * tokens)
        layers = [*([] if past_key_values is None else past_key_values.layers), SimpleNamespace(keys=kept)]
        return SimpleNamespace(past_key_values=SimpleNamespace(layers=layers))

    __call__ = forward

    def parameters(self) -> list[Any]:
        return [torch.empty(100)]


def test_peak_memory_by_hand() -> None:
    # Of 8 tokens 5 kB each for a while and 1 kB to stay; then two steps: 40 kB at the highest, 10 kB of them the cache.
    used = measure_memory(Toy(), shape(layers=(layer(token_bytes=32),)), tiny_tokens(1, 10), prompt=8)  # type: ignore[arg-type]
    assert (used.weights, used.cache, used.cache_by_formula) == (400, 10 * 1024, 10 * 32)
    assert used.activations + used.cache == pytest.approx(5 * 8 * 1024, rel=0.02)
    assert used.peak == used.weights + used.cache + used.activations


def test_a_view_keeps_the_whole_storage() -> None:
    whole = torch.zeros(4, 10)
    layers = [SimpleNamespace(keys=whole[:, 5:], values=whole[:, :5], window=torch.tensor(3), length=7)]
    assert cache_bytes(SimpleNamespace(layers=layers)) == 160


def test_a_batch_that_cannot_fit_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The cache of 10 tokens and the input and output of an activation of 8 x 40 numbers, for 3 sequences
    least = 3 * (2 * 16 * 2) * (10 + 3) + 2 * 3 * 8 * 40 * 2
    for free, fits in ((least, True), (least - 1, False), (None, True)):
        monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda free=free: free)
        if fits:
            memory.require_cell_memory(shape(), batch=3, prompt=8, gen=2)
        else:
            with pytest.raises(ResourceError, match=r"need at least 0.00 GB of memory"):
                memory.require_cell_memory(shape(), batch=3, prompt=8, gen=2)


# Turns


def test_orders_of_turns_are_balanced() -> None:
    assert ["".join(order_of_turns("ab", repeat)) for repeat in range(4)] == ["ab", "ba", "ba", "ab"]
    three = ["".join(order_of_turns("abc", repeat)) for repeat in range(6)]
    assert sorted(three) == ["abc", "acb", "bac", "bca", "cab", "cba"]


def fake_turns(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Turns take the given seconds, or raise the given error, after a warm-up; returns who took them."""
    taken: list[str] = []
    left = {name: iter([(9.0, 9.0), *rows]) for name, rows in seconds.items()}

    def turn(model: Any, ids: Any, prompt: int) -> tuple[float, float]:
        taken.append(model.name)
        found = next(left[model.name])
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(measure, "turn", turn)
    monkeypatch.setattr(measure, "measure_memory", lambda *_: None)
    return taken


def stand_ins(*names: str) -> dict[str, Any]:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
    return {name: SimpleNamespace(name=name, config=config, device=torch.device("cpu")) for name in names}


def measured(names: str, repeats: int) -> list[CellRecord]:
    settings = BenchSettings(repeats=repeats, gen=4)
    shapes = {name: shape(block_linears=1000 // (1 + number)) for number, name in enumerate(names)}
    return measure_cell(stand_ins(*names), shapes, "d", 2, 8, settings, Reporter())


def test_dense_and_compressed_take_turns_and_are_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fake_turns(
        monkeypatch,
        {"d": [(2, 4), (6, 8), (3, 9)], "c": [(1, 8), (2, 8), (1, 6)]},
    )
    dense, small = measured("dc", 3)
    assert taken == ["d", "c", "d", "c", "c", "d", "c", "d"]  # warm-up, then three repeats
    assert small.prefill is not None
    assert small.decode is not None
    assert dense.prefill is not None
    assert dense.prefill.speed_up is None
    assert dense.prefill.seconds.values == (2, 6, 3)
    assert small.prefill.speed_up == Spread(median=3, lower_quartile=2.5, upper_quartile=3, values=(2, 3, 3))
    assert small.decode.speed_up == Spread(median=1, lower_quartile=0.75, upper_quartile=1.25, values=(0.5, 1, 1.5))
    assert small.prefill.tokens_per_second == 2 * 8 / 1
    assert small.decode.tokens_per_second == 2 * 4 / 8
    assert small.generated_per_second == 2 * 4 / (1 + 8)
    assert (small.prefill.verdict, small.decode.verdict) == ("faster", "no clear difference")
    assert small.prefill.ideal is not None
    assert small.prefill.reached is not None
    assert small.prefill.ideal.linears == 2
    assert small.prefill.reached.linears == 3 / 2


@pytest.mark.parametrize("lacking", ["d", "c", "e"])
def test_who_runs_out_of_memory_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    seconds: dict[str, list[Any]] = {name: [(1, 1), (1, 1)] for name in "dce"}
    seconds[lacking][1] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    fake_turns(monkeypatch, seconds)
    cells = {cell.model: cell for cell in measured("dce", 2)}
    assert "Tried to allocate 2 GiB" in str(cells[lacking].error)
    assert "Lower --batch or --prompt" in str(cells[lacking].error)
    assert cells[lacking].phases == {}
    for name in set("dce") - {lacking}:
        assert cells[name].error is None
        compared = name != "d" and lacking != "d"
        assert (cells[name].phases["prefill"].speed_up is not None) == compared


def test_verdicts() -> None:
    def verdict(*ratios: float) -> str | None:
        return PhaseRecord(tokens=1, seconds=Spread.of([1.0]), speed_up=Spread.of(ratios)).verdict

    assert verdict(1.1, 1.2, 1.3) == "faster"
    assert verdict(0.7, 0.8, 0.9) == "slower"
    assert verdict(0.9, 1.0, 1.1) == "no clear difference"
    assert verdict(0.5, 1.2, 1.2, 1.2, 1.2) == "faster"  # one slow turn is below the quartile
    assert PhaseRecord(tokens=1, seconds=Spread.of([1.0])).verdict is None


# Whole runs


def test_a_benchmark_of_models_in_memory() -> None:
    models = {"dense": tiny_model("llama"), "small": low_rank_model("llama")}
    record = benchmark_loaded(models, "dense", BenchSettings(**QUICK))
    assert [(cell.model, cell.batch, cell.prompt) for cell in record.cells] == [
        (name, batch, prompt) for batch in (1, 2) for prompt in (4, 6) for name in models
    ]
    for cell in record.cells:
        assert cell.error is None
        assert cell.memory is not None
        assert cell.memory.cache == cell.memory.cache_by_formula == 2 * 2 * cell.batch * 2 * 8 * (cell.prompt + 3) * 4
        assert cell.memory.activations > 0
        assert len(cell.phases["decode"].seconds.values) == 2
    assert [model.fused_groups for model in record.models] == [0, 4]
    assert record.models[1].parameter_bytes == 4 * models["small"].num_parameters()
    assert len(record.findings) == 1
    for phase in ("prefill at 1 x 4", "decode at 2 x 6"):
        assert phase in record.findings[0]
    json.dumps(record.to_dict(), allow_nan=False)


def test_without_fusing_a_model_stays_as_it_is() -> None:
    model = low_rank_model("llama")
    kinds = [type(module) for module in model.modules()]
    record = benchmark_loaded({"small": model}, None, BenchSettings(**QUICK, fuse=False))
    assert record.models[0].fused_groups == 0
    assert [type(module) for module in model.modules()] == kinds
    assert record.findings == []
    assert record.cells[0].phases["prefill"].ideal is None


def test_compiling_compiles_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append((call, options)) or call)
    models = {"dense": tiny_model("llama"), "small": low_rank_model("llama")}
    benchmark_loaded(models, "dense", BenchSettings(**QUICK, compile=True))
    assert [call.__self__ for call, _ in compiled] == list(models.values())
    assert all(options == {"dynamic": False} for _, options in compiled)


def test_a_benchmark_of_folders(dense: Path, compressed: Path) -> None:
    threads = torch.get_num_threads()
    record = benchmark([compressed], dense, BenchSettings(**QUICK), device="cpu", threads=1)
    assert torch.get_num_threads() == threads
    assert [model.name for model in record.models] == ["dense", "small"]
    assert record.compressed == ["small"]
    assert record.machine["threads"] == 1
    assert record.machine["dtype"] == "float32"
    first, second = record.models
    assert first.linears / second.linears == record.of("small")[0].phases["decode"].ideal.linears  # type: ignore[union-attr]
    alone = benchmark([compressed], settings=BenchSettings(**QUICK), device="cpu", dtype="bfloat16")
    assert alone.base is None
    assert alone.machine["dtype"] == "bfloat16"
    assert 2 * alone.models[0].parameter_bytes == second.parameter_bytes
    for figure in (throughput_figure(record), memory_figure(record), throughput_figure(alone)):
        assert figure.startswith("<?xml")


def refused(models: list[Any], base: Any = None, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        benchmark(models, base, BenchSettings(**QUICK | settings), device="cpu")
    return str(error.value)


def test_models_that_cannot_be_compared_are_refused(
    dense: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdllm.inference.bench.run.load_model", None)  # nothing is loaded for any of these
    wider = save_dense(tmp_path / "wider", intermediate_size=64)
    words = tiny_model("llama", vocab_size=200)
    words.save_pretrained(tmp_path / "words")
    other = save_dense(tmp_path / "other", family="mistral")
    assert "is not an svdllm checkpoint, it is a dense model (llama)" in refused([dense])
    assert "is of the family mistral, small was made of a llama" in refused([compressed], other)
    assert "wider has 64 x 32 as model.layers.0.mlp" in refused([compressed], wider)
    assert "words has 200 x 32 as model.embed_tokens.weight" in refused([compressed], tmp_path / "words")
    assert "named twice" in refused([compressed, str(compressed)], dense)
    assert "named twice" in refused([compressed], compressed)
    assert "no config.json" in refused([tmp_path])
    assert "Nothing to measure" in refused([], dense)
    assert "--prompt 62 plus --gen 3 = 65 is beyond dense's context of 64 tokens" in refused(
        [compressed], dense, prompts=(62,)
    )


def test_a_compressed_base_is_refused(compressed: Path, dense: Path, tmp_path: Path) -> None:
    second = run(dense, tmp_path / "second").output_dir
    assert f"--base {second} is compressed; give" in refused([compressed], second)


def test_models_that_do_not_fit_together_are_refused(
    dense: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdllm.inference.bench.run.load_model", None)
    monkeypatch.setattr("svdllm.common.memory.available_bytes", lambda: 10**5)
    with pytest.raises(ResourceError, match=r"together need 0.00 GB of memory, 0.00 GB are free on cpu"):
        benchmark([compressed], dense, BenchSettings(**QUICK), device="cpu")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_sizes": (1, 0)}, "--batch must be at least 1, found 1, 0"),
        ({"prompts": ()}, "--prompt must be at least 1, found nothing"),
        ({"gen": 0}, "--gen must be at least 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"warmup": 0}, "--warmup must be at least 1"),
        ({"prompts": (8, 8)}, "--prompt 8,8 names a number twice"),
    ],
)
def test_settings_that_measure_nothing(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        BenchSettings(**wrong)


# The command


def cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["bench", *map(str, arguments)])
    return int(done.value.code or 0)


SHORT = ["--batch", "1,2", "--prompt", "4", "--gen", "2", "--repeats", "2", "--device", "cpu"]


def test_the_command_prints_tables_or_one_document(
    dense: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdllm.cli.bench.console.width", 140, raising=False)
    output = tmp_path / "out"
    assert cli(compressed, "--base", dense, *SHORT, "-o", output) == 0
    printed = capsys.readouterr().out
    for words in (
        "small against dense",
        "speed-up",
        "ideal",
        "reached",
        "activations",
        "prefill at 2 x 4",
        "linears alone",
    ):
        assert words in printed
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "memory.svg", "throughput.svg"]
    assert cli(compressed, "--base", dense, *SHORT, "--no-fuse", "--json") == 0
    document, kept = json.loads(capsys.readouterr().out), json.loads((output / "bench.json").read_text())
    assert document.keys() == kept.keys()
    assert [model["fused_groups"] for model in document["models"]] == [0, 0]
    cell = kept["cells"][1]
    assert (cell["model"], cell["batch"], cell["prompt"], cell["gen"]) == ("small", 1, 4, 2)
    assert cell["time_to_first_token"] == cell["prefill"]["seconds"]["median"]
    assert cell["prefill"]["reached"]["model"] == pytest.approx(
        cell["prefill"]["speed_up"]["median"] / cell["prefill"]["ideal"]["model"]
    )
    assert cli(compressed, *SHORT) == 0
    assert "speed-up" not in capsys.readouterr().out


def test_mistakes_on_the_command_line(
    dense: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        assert cli(*arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "--batch 'one' is not a list of numbers" in said(compressed, "--batch", "one")
    assert "--threads must be at least 1" in said(compressed, "--threads", 0)
    assert "--dtype 'int4' is unknown" in said(compressed, *SHORT, "--dtype", "int4")
    assert "the output is a folder" in said(compressed, "-o", tmp_path / "bench.json")
    assert "nothing is overwritten" in said(compressed, "-o", dense)
    if not torch.cuda.is_available():
        assert "--device 'cuda' is not available here" in said(compressed, *SHORT, "--device", "cuda")


# Random weights


@pytest.fixture(scope="module")
def script() -> Any:
    """The program that makes models of random weights."""
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "inference_gpu.py"
    spec = importlib.util.spec_from_file_location("inference_gpu", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_random_twins_of_a_config(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("llama", hidden_size=64, num_key_value_heads=4).save_pretrained(tmp_path / "tiny")
    what = f"--config {tmp_path / 'tiny'} --ratios 0.2,0.5 --batch 1 --prompt 4 --gen 2 --repeats 1"
    where = f"--device cpu --dtype float32 --output {tmp_path / 'out'}"
    record = script.main(f"{what} {where}".split())
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "out" / "bench.json").read_text())
    dense, twenty, fifty = record.models
    assert [cell["model"] for cell in printed["cells"]] == ["dense", "20 % removed", "50 % removed"]
    assert dense.linears * 0.8 >= twenty.linears > fifty.linears
    assert dense.linears * 0.5 >= fifty.linears
    assert (tmp_path / "out" / "memory.svg").is_file()


def test_sizes_of_packed_linears_and_narrower_mlps() -> None:
    """Weights of a packed linear: r (d + n - r), and 4 bytes for every entry of its order; of all forms by hand."""
    forms = {
        "model.layers.0.self_attn.q_proj": ROWS,  # 32 x 32
        "model.layers.0.mlp.gate_proj": COLUMNS | {"out_features": 40},  # 48 x 32, of a narrower MLP
        "model.layers.0.mlp.up_proj": {"form": "narrow", "out_features": 40},
        "model.layers.0.mlp.down_proj": {"form": "narrow", "in_features": 40},
    }
    dense, model = shape_of(tiny_model("llama")), shape_of(model_with("llama", forms))
    removed = 32 * 32 - 7 * (32 + 32 - 7) + 48 * 32 - 5 * (40 + 32 - 5) + 2 * 8 * 32
    assert model.block_linears == dense.block_linears - removed
    assert model.read_bytes == dense.read_bytes - 4 * removed + 4 * (32 + 32)


def test_the_shapes_are_those_of_llama_7b(script: Any) -> None:
    config = script.llama_7b()
    assert build_skeleton(config).num_parameters() == 6_738_415_616
    ranks = stored_ranks(script.twin_config(config, 0.2))
    assert ranks["model.layers.31.self_attn.q_proj"] == 1632  # 0.8 x 4096 x 4096 / 8192 = 1638, in eights
    assert ranks["model.layers.0.mlp.down_proj"] == 2384  # 0.8 x 4096 x 11008 / 15104 = 2388
    assert len(ranks) == 32 * 7
