"""The low-rank model classes: exact at full rank, never loaded with weights that did not come from the files."""

from __future__ import annotations

import copy
import filecmp
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from families import FAMILIES, UNUSUAL, dense_weight, linear_targets, tiny_config, tiny_model, tiny_tokens
from forms import model_in_forms
from svdllm.common.errors import UnsupportedModelError
from svdllm.models.low_rank import (
    LowRankLinear,
    compare_hashes,
    families,
    family_classes,
    low_rank_config,
    register_all,
    swap_linears,
    write_hashes,
)
from svdllm.models.low_rank.families import class_stem

register_all()


def exact_factors(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Full-rank factors in which one factor is the identity, so that the product is the weight to the last bit."""
    out_features, in_features = weight_OI.shape
    if out_features <= in_features:
        return torch.eye(out_features), weight_OI
    return weight_OI, torch.eye(in_features)


def pair(rank: int) -> dict[str, Any]:
    return {"form": "pair", "rank": rank}


def factorise(dense: Any, names: list[str] | None = None) -> Any:
    """The low-rank model that equals ``dense``, with ``names`` (default: every linear of the blocks) factored."""
    targets = linear_targets(dense)
    names = list(targets) if names is None else names
    forms = {name: pair(min(dense_weight(targets[name]).shape)) for name in names}
    settings = {"format_version": 2, "base_model_type": dense.config.model_type, "forms": forms}
    config = low_rank_config(dense.config, settings)
    model = family_classes(dense.config.model_type).causal_lm(config)
    state = dense.state_dict()
    for name in names:
        del state[f"{name}.weight"]
        u_OR, v_RI = exact_factors(dense_weight(targets[name]))
        state |= {f"{name}.svd_u.weight": u_OR, f"{name}.svd_v.weight": v_RI}
        if f"{name}.bias" in state:
            state[f"{name}.svd_u.bias"] = state.pop(f"{name}.bias")
    model.load_state_dict(state, strict=True)
    return model.eval()


def saved(tmp_path: Path, family: str = "llama", names: list[str] | None = None, **overrides: Any) -> tuple[Path, Any]:
    folder = tmp_path / "model"
    model = factorise(tiny_model(family, **overrides), names)
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tiny_tokens()).logits


@pytest.fixture
def memory_of_nan():
    """What nobody has written is NaN, and not by chance what lay there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_folder(a: Path, b: Path) -> None:
    names = sorted(p.relative_to(a).as_posix() for p in a.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(b).as_posix() for p in b.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


# the layer


def test_low_rank_linear_by_hand():
    layer = LowRankLinear(3, 2, 1, bias=True, dtype=torch.float64)
    layer.load_state_dict(
        {
            "svd_v.weight": torch.tensor([[1.0, 2.0, 3.0]]),
            "svd_u.weight": torch.tensor([[10.0], [-1.0]]),
            "svd_u.bias": torch.tensor([0.5, 0.25]),
        }
    )
    torch.testing.assert_close(
        layer(torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64)), torch.tensor([[90.5, -8.75]], dtype=torch.float64)
    )
    assert not any(hasattr(layer, name) for name in ("weight", "bias", "in_features", "out_features"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_swap_keeps_device_dtype_bias_and_class_names(device: str):
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"), dtype=torch.bfloat16)
    swap_linears(model, {"transformer.h.0.mlp.c_fc": pair(5), "transformer.h.1.mlp.c_fc": pair(7)})
    first, second = (model.transformer.h[i].mlp for i in (0, 1))
    assert first.c_fc.svd_v.weight.shape == (5, 32)
    assert second.c_fc.svd_u.weight.shape == (128, 7)
    assert first.c_fc.svd_u.bias is not None
    assert {(p.dtype, p.device.type) for p in first.c_fc.parameters()} == {(torch.bfloat16, device)}
    assert type(first) is type(second)
    assert type(first).__name__ == "GPT2MLP"
    swap_linears(model, {"transformer.h.1.mlp.c_proj": pair(3)})
    assert type(first) is not type(second)
    assert type(first).__mro__[1] is type(second).__mro__[1]


def test_swap_names_every_module_that_is_no_linear():
    model = tiny_model("llama")
    with pytest.raises(
        ValueError, match=r"2 of 3 .*not in the model: nope; not a linear: model\.norm \(LlamaRMSNorm\)"
    ):
        swap_linears(model, {name: pair(1) for name in ("nope", "model.norm", "model.layers.0.mlp.up_proj")})
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


# every family


@pytest.mark.parametrize("family", FAMILIES)
def test_family_round_trip(family: str, tmp_path: Path):
    dense = tiny_model(family)
    model = factorise(dense)
    expected = logits(dense)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "a")
    stored = set(load_file(tmp_path / "a/model.safetensors"))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert stored == set(model.state_dict()) - tied

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.svdllm == model.config.svdllm

    bare = AutoModel.from_pretrained(tmp_path / "a")
    body = model.base_model(tiny_tokens()).last_hidden_state
    assert torch.equal(bare(tiny_tokens()).last_hidden_state, body)

    loaded.save_pretrained(tmp_path / "b")
    assert_same_folder(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_families_are_factored_and_loaded_whole(family: str, tmp_path: Path, memory_of_nan: None):
    dense = tiny_model(family)
    assert not torch.isnan(logits(dense)).any()
    model = factorise(dense)
    factored = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert factored == list(linear_targets(dense))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    bare = AutoModel.from_pretrained(tmp_path)
    body = model.model(tiny_tokens()).last_hidden_state
    assert torch.equal(bare(tiny_tokens()).last_hidden_state, body)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_with_dynamic_and_static_cache(family: str):
    dense = tiny_model(family)
    model = factorise(dense)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = dense.generate(tiny_tokens(), **kwargs)
    assert torch.equal(model.generate(tiny_tokens(), **kwargs), expected)
    assert torch.equal(
        model.generate(tiny_tokens(), cache_implementation="static", disable_compile=True, **kwargs), expected
    )


PARTLY = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


def test_partly_factored_and_untied(tmp_path: Path):
    folder, model = saved(tmp_path, names=PARTLY, tie_word_embeddings=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    layers = loaded.model.layers
    assert isinstance(layers[0].self_attn.q_proj, LowRankLinear)
    assert isinstance(layers[1].self_attn.q_proj, nn.Linear)
    assert type(layers[0].self_attn) is not type(layers[1].self_attn)
    bare = AutoModel.from_pretrained(folder)  # the untied head is in the file and not in the model
    assert torch.equal(bare(tiny_tokens()).last_hidden_state, model.model(tiny_tokens()).last_hidden_state)
    bare.save_pretrained(folder.parent / "bare")
    again = AutoModel.from_pretrained(folder.parent / "bare")
    assert torch.equal(bare(tiny_tokens()).last_hidden_state, again(tiny_tokens()).last_hidden_state)


def test_factored_head(tmp_path: Path):
    dense = tiny_model("llama", tie_word_embeddings=False)
    model = factorise(dense, [*linear_targets(dense)][:1])
    config = copy.deepcopy(model.config)
    config.svdllm["forms"]["lm_head"] = pair(9)
    headed = type(model)(config)
    assert isinstance(headed.lm_head, LowRankLinear)
    headed.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(headed.eval()))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "model").layers[0].self_attn.q_proj, LowRankLinear)


def test_source_layout_that_the_base_class_renames(tmp_path: Path):
    folder, model = saved(tmp_path, "gpt_neox")
    weights = load_file(folder / "model.safetensors")
    weights["embed_out.weight"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_hashes(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(weights)


def test_dtype_device_map_and_shards(tmp_path: Path):
    folder, model = saved(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(half), logits(copy.deepcopy(model).bfloat16()))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), logits(model))


def test_copies_and_pickles(tmp_path: Path):
    folder, model = saved(tmp_path, names=PARTLY)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), logits(model))
    assert clone.model.layers[0].mlp.down_proj.svd_u.weight is not model.model.layers[0].mlp.down_proj.svd_u.weight
    unpickled = pickle.loads(pickle.dumps(model))
    assert type(unpickled.model.layers[0].mlp) is type(model.model.layers[0].mlp)
    assert torch.equal(logits(unpickled), logits(model))
    assert pickle.loads(pickle.dumps(model.config)) == copy.deepcopy(model.config) == model.config
    assert AutoConfig.from_pretrained(folder).svdllm == model.config.svdllm


def test_torch_compile():
    model = factorise(tiny_model("llama", num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # traced whole; no compiler is needed
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


# the auto classes, the tokenizer and the pipeline


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_pipeline_and_tokenizer(tmp_path: Path):
    folder, _ = saved(tmp_path)
    tiny_tokenizer().save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
    generator = pipeline("text-generation", model=str(folder))
    (result,) = generator("w5 w7 w9", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("w5 w7 w9")


def test_registering_imports_no_family():
    script = (
        "import sys, transformers; from transformers import AutoModelForCausalLM, PreTrainedModel; "
        "from svdllm.models.low_rank import register_all; before = len(sys.modules); register_all(); "
        "assert len(sys.modules) == before, sorted(sys.modules)[:5]; "
        "assert 'svdllm_llama' in transformers.CONFIG_MAPPING; "
        "assert 'transformers.models.opt.configuration_opt' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_every_family_has_its_own_names():
    stems = [class_stem(family) for family in families()]
    assert len(set(stems)) == len(stems) > 150
    assert all(stem.isidentifier() for stem in stems)
    assert class_stem("llama") == "SvdllmLlama"


def test_unknown_family():
    with pytest.raises(UnsupportedModelError, match=r"no causal language model .* of type 'vit'"):
        family_classes("vit")


# the config


def test_config_holds_the_base_fields_and_the_old_rope_fields(tmp_path: Path):
    folder, model = saved(tmp_path)
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "svdllm_llama"
    assert written["architectures"] == ["SvdllmLlamaForCausalLM"]
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["auto_map"] == {
        "AutoConfig": "configuration_svdllm_llama.SvdllmLlamaConfig",
        "AutoModel": "modeling_svdllm_llama.SvdllmLlamaModel",
        "AutoModelForCausalLM": "modeling_svdllm_llama.SvdllmLlamaForCausalLM",
    }
    base = tiny_config("llama").to_dict()
    own = ("model_type", "architectures", "_name_or_path", "dtype")
    assert {k: v for k, v in base.items() if k not in own} == {
        k: model.config.to_dict()[k] for k in base if k not in own
    }
    assert AutoConfig.from_pretrained(folder).to_dict().keys() == model.config.to_dict().keys()


def test_rope_fields_per_layer_type_and_scaled():
    settings = {"format_version": 1, "base_model_type": "x", "ranks": {}}
    gemma = low_rank_config(tiny_config("gemma3_text"), settings).to_dict()
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (5e5, 2e4)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    config = low_rank_config(tiny_config("llama", rope_parameters=dict(rope)), settings)
    written = config.to_dict()
    assert written["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert type(config)(**written).rope_parameters == config.rope_parameters == rope


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_version": 3, "forms": {}}, r"reads checkpoint formats 1 to 2, found .*=3.*Upgrade with `pip"),
        ({"ranks": {}}, "found format_version=None"),
        ({"format_version": 1}, "ranks: expected a mapping"),
        (
            {"format_version": 1, "ranks": {"a": 0, "b": 2, "c": True}},
            r"positive integers, found \{'a': 0, 'c': True\}",
        ),
        ([1], "expected a mapping, found list"),
    ],
)
def test_config_that_cannot_be_read(settings: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        low_rank_config(tiny_config("llama"), settings)
    written = {**tiny_config("llama").to_dict(), "model_type": "svdllm_llama", "svdllm": settings}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


# tensor parallelism


def test_parallel_plan_of_a_partly_factored_model():
    plan = factorise(tiny_model("llama"), PARTLY).config.base_model_tp_plan
    assert list(plan.items())[:6] == [
        ("layers.*.self_attn.q_proj.svd_u", "colwise"),
        ("layers.*.self_attn.o_proj.svd_v", "rowwise"),
        ("layers.*.mlp.down_proj.svd_v", "rowwise"),
        ("layers.*.self_attn.q_proj.svd_v", "replicate"),
        ("layers.*.self_attn.o_proj.svd_u", "replicate"),
        ("layers.*.mlp.down_proj.svd_u", "replicate"),
    ]
    assert plan["layers.*.self_attn.q_proj"] == "colwise"


def test_expanded_parallel_plan():
    model = factorise(tiny_model("llama"), PARTLY)
    if not hasattr(LlamaForCausalLM, "_expand_parallel_plan"):
        pytest.skip("this transformers applies the plan by another route")
    plan = model._expand_parallel_plan(model.tp_plan)
    attention = {k.removeprefix("model.layers.0."): v for k, v in plan.items() if ".layers.0.self_attn" in k}
    assert attention == {
        "self_attn.q_proj.svd_v.weight": "replicate",
        "self_attn.q_proj.svd_v": "replicate",
        "self_attn.q_proj.svd_u.weight": "colwise",
        "self_attn.q_proj.svd_u": "colwise",
        "self_attn.k_proj.weight": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj.weight": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj.weight": "rowwise",
        "self_attn.o_proj": "rowwise",
    }
    assert "model.layers.1.self_attn.o_proj" not in plan
    assert plan["model.layers.1.self_attn.o_proj.svd_v.weight"] == "rowwise"


def test_expanded_parallel_plan_of_the_caller():
    model = factorise(tiny_model("opt"))  # which has no plan of its own
    if not hasattr(LlamaForCausalLM, "_expand_parallel_plan"):
        pytest.skip("this transformers applies the plan by another route")
    plan = model._expand_parallel_plan({"model.decoder.layers.*.fc2": "rowwise"})
    assert plan["model.decoder.layers.1.fc2.svd_v"] == "rowwise"
    assert plan["model.decoder.layers.1.fc2.svd_u"] == "replicate"
    assert "model.decoder.layers.1.fc2" not in plan


def test_parallel_plan_of_fused_projections():
    plan = factorise(tiny_model("phi3")).config.base_model_tp_plan
    assert plan["layers.*.self_attn.qkv_proj.svd_u"] == "colwise_gather_output"
    assert plan["layers.*.mlp.down_proj.svd_v"] == "rowwise_split_input"
    assert factorise(tiny_model("gpt2")).config.base_model_tp_plan is None


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from svdllm.models.low_rank import register_all
register_all()
dist.init_process_group("gloo")
expected = load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
shards = {name: p.to_local().shape[0] for name, p in model.named_parameters() if hasattr(p, "to_local")}
assert shards["model.layers.0.self_attn.q_proj.svd_u.weight"] == 16, shards
assert "model.layers.0.self_attn.q_proj.svd_v.weight" not in shards
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
model.save_pretrained(sys.argv[3])
dist.barrier()
dist.destroy_process_group()
"""


def test_tensor_parallel_in_two_processes(tmp_path: Path):
    folder, model = saved(tmp_path, names=PARTLY, tie_word_embeddings=False)
    save_file({"ids": tiny_tokens(), "logits": logits(model)}, tmp_path / "expected.safetensors")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    paths = [tmp_path / name for name in ("run.py", "model", "expected.safetensors", "again")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, *map(str, paths)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_folder(folder, tmp_path / "again")


# files that are not what was written


def test_truncated_and_altered_weights(tmp_path: Path):
    folder, _ = saved(tmp_path)
    path = folder / "model.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-100])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: expected {len(original)} bytes, found {len(original) - 100}"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected SHA-256 \w{64}, found \w{64}.*delete svdllm/hashes"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, check_integrity=False)
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_files_without_hashes(tmp_path: Path):
    folder = tmp_path / "model"
    factorise(tiny_model("llama")).save_pretrained(folder, max_shard_size="20KB")
    shutil.rmtree(folder / "svdllm")
    AutoModelForCausalLM.from_pretrained(folder)
    first, second, third = sorted(folder.glob("*.safetensors"))[:3]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    third.write_bytes(b"nonsense of no length")
    with pytest.raises(
        ValueError,
        match=rf"{first.name}: expected \d+ bytes, found .* {second.name} is missing.* {third.name}: expected a",
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_hashes_cover_the_folder_and_only_weights_stop_a_load(tmp_path: Path):
    folder, _ = saved(tmp_path)
    assert compare_hashes(folder) == []
    (folder / "README.md").write_text("a card")
    (folder / "svdllm/report.json").write_text("{}")
    write_hashes(folder)
    files = json.loads((folder / "svdllm/hashes.json").read_text())["files"]
    assert list(files) == sorted(files)
    assert {"generation_config.json", "config.json", "model.safetensors", "modeling_svdllm_llama.py"} <= set(files)
    assert not any(name.startswith("svdllm/") for name in files)
    (folder / "README.md").write_text("another card")
    assert compare_hashes(folder) == []
    (folder / "generation_config.json").write_text("{}")
    AutoModelForCausalLM.from_pretrained(folder)
    (difference,) = compare_hashes(folder)
    assert difference.startswith("generation_config.json: expected ")


def rewrite_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_hashes(folder)


def test_missing_unexpected_and_misshapen_weights(tmp_path: Path):
    folder, _ = saved(tmp_path)
    name = "model.layers.1.mlp.up_proj.svd_u.weight"
    rewrite_weights(folder, lambda w: w.update({"model.layers.0.extra": w.pop(name)}))
    with pytest.raises(ValueError, match=rf"missing: {name}; unexpected: model.layers.0.extra; of another shape: none"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"missing: .*svd_u\.weight; unexpected: .*extra"):
        AutoModel.from_pretrained(folder)
    rewrite_weights(folder, lambda w: w.update({name: w.pop("model.layers.0.extra")[:, :3].contiguous()}))
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"of another shape: \('{name}'"):
            AutoModelForCausalLM.from_pretrained(folder, **kwargs)


# remote code: the folder by itself, in a process in which svdllm cannot be imported

WITHOUT_SVDLLM = """
import sys
class Blocker:  # an editable install is found through sys.path and meta-path hooks; this one comes first
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "svdllm":
            raise ImportError("svdllm is blocked")
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, AutoModelForCausalLM
from safetensors.torch import load_file
folder, out = sys.argv[1], sys.argv[2]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise SystemExit("loaded without the code")
expected = load_file(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], rtol=0, atol=0)
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(bare(expected["ids"]).last_hidden_state, model.base_model(expected["ids"]).last_hidden_state)
model.save_pretrained(out)
assert "svdllm" not in sys.modules
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama in every form"])
def test_remote_code_without_the_library(family: str, tmp_path: Path):
    family, _, other = family.partition(" ")
    folder, model = saved(tmp_path, family)
    if other:
        shutil.rmtree(folder)
        model = model_in_forms(family)[1]
        model.save_pretrained(folder)
    save_file({"ids": tiny_tokens(), "logits": logits(model)}, tmp_path / "expected.safetensors")
    command = [
        sys.executable,
        "-c",
        WITHOUT_SVDLLM,
        str(folder),
        str(tmp_path / "again"),
        str(tmp_path / "expected.safetensors"),
    ]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_folder(folder, tmp_path / "again")


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_code_is_valid_and_the_same_each_time(family: str):
    files = family_classes(family).causal_lm.code_files()
    assert files == family_classes(family).causal_lm.code_files()
    assert all(name.endswith(".py") and name.removesuffix(".py").isidentifier() for name in files)
    for name, text in files.items():
        compile(text, name, "exec")
        assert "svdllm.models.low_rank" not in text


def test_file_names_of_a_type_with_a_dash():
    assert set(family_classes("openai-gpt").causal_lm.code_files()) == {
        "configuration_svdllm_openai_gpt.py",
        "modeling_svdllm_openai_gpt.py",
    }
