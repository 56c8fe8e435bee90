"""The options that plan and compress share, and the recipe they add up to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svdllm.checkpoint.quantized import NVFP4_GROUP
from svdllm.common.errors import InputError
from svdllm.compression.ranks import ALLOCATIONS
from svdllm.compression.recipe import Recipe
from svdllm.compression.recipe_files import allocation_file, load_settings, make_recipe, parse_amount, preset_settings
from svdllm.compression.recipe_parts import BUDGETS, OF_A_BUDGET

# Flags that do nothing unless another setting has one of these values.
ONLY_WITH = {
    "asvd_alpha": ("method", ("asvd",)),
    "probe_share": ("allocation", tuple(name for name, row in ALLOCATIONS.items() if row.probing)),
    "strs_ratios": ("allocation", ("strs",)),
}


def option(help: str, panel: str, default: str | bool = False, *names: str) -> Any:
    """An option in a panel of the help; ``default`` says what holds without it (True: the value, False: nothing)."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel)


Model = Annotated[str, typer.Argument(help="Hub id, local folder, or GGUF file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub: local files and its cache only.")]
KvCache = Annotated[str, typer.Option(help="ordinary, latent (less memory, see docs/kv-cache.md) or latent-values.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]

Ratio = Annotated[
    str | None,
    typer.Option(
        help="Share of the parameters of the compressed linears that is REMOVED: 0.2 keeps 80 %. "
        "Several, as in 0.2,0.4,0.6, share one calibration.",
        show_default=False,
        rich_help_panel="Budget (exactly one)",
    ),
]
TargetParams = Annotated[
    str | None,
    typer.Option(
        help="Parameters of the whole compressed model, like 100M.",
        show_default=False,
        rich_help_panel="Budget (exactly one)",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        help="Bytes of the compressed model's weight files, like 300MB.",
        show_default=False,
        rich_help_panel="Budget (exactly one)",
    ),
]
FactorBits = Annotated[
    int | None,
    typer.Option(
        help="8 or 4: --target-size is for what [bold]svdllm quantize[/bold] with as many --bits then makes of the result. "
        "With 4, ranks are multiples of 16.",
        show_default="the size as written",
        rich_help_panel="Budget (exactly one)",
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        help="How many times as fast all linears (the head and what stays dense included) shall be, like 1.3, by times "
        "measured on this machine. Attention, norms and Python are outside.",
        show_default=False,
        rich_help_panel="Budget (exactly one)",
    ),
]
SpeedupTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens at once that --target-speedup is for: 1 is decoding of one text, 1024 a prompt.",
        show_default="1",
        rich_help_panel="Budget (exactly one)",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Settings to start from: paper (SVD-LLM as published), balanced, or best (more time).",
        show_default="balanced",
        rich_help_panel="Recipe",
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        help="YAML file of settings, such as the svdllm/recipe.yaml of a checkpoint; flags override it.",
        show_default=False,
        rich_help_panel="Recipe",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="svd-llm (truncation-aware), svd (plain), asvd (input scales) or fwsvd (Fisher weights of output rows).",
        show_default="svd-llm",
        rich_help_panel="Method",
    ),
]
AsvdAlpha = Annotated[
    float | None, typer.Option(help="Exponent of ASVD's scales.", show_default="0.5", rich_help_panel="Method")
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="What error is measured in: input (of the outputs, as in the paper) or two-sided (weighted by the loss's "
        "gradients; one backward pass).",
        show_default="two-sided",
        rich_help_panel="Method",
    ),
]
GradientSamples = Annotated[
    int | None,
    typer.Option(
        help="Calibration windows of the backward pass (two-sided, fwsvd).", show_default="32", rich_help_panel="Method"
    ),
]
CalibrationMode = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Whose inputs a linear is fitted to: dense (the dense model's) or sequential (those of the model as far "
        "as it is compressed; several forward passes more).",
        show_default="dense",
        rich_help_panel="Method",
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        help="How far outputs are pulled to the dense model's, 0 to 1 (sequential).",
        show_default="chosen per group on held-out text",
        rich_help_panel="Method",
    ),
]
BiasCorrection = Annotated[
    bool | None,
    typer.Option(
        "--bias-correction/--no-bias-correction",
        help="Factor centred inputs, and correct the mean output by a bias.",
        show_default="no",
        rich_help_panel="Method",
    ),
]
JointKV = Annotated[
    bool | None,
    typer.Option(
        "--joint-kv/--no-joint-kv",
        help="One first factor for k_proj and v_proj of a layer, as in multi-head latent attention: `--kv-cache latent` "
        "then keeps one latent for both. For a smaller cache.",
        show_default="no",
        rich_help_panel="Method",
    ),
]
Shrinkage = Annotated[
    float | None,
    typer.Option(
        help="Share of its diagonal mixed into the Gram, against over-fitting the text; 0 is the paper.",
        show_default="0.1",
        rich_help_panel="Method",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        help="How the budget is spread: uniform (the paper), v2 (SVD-LLM V2), effective-rank (D-Rank), loss (measured "
        "on the model, may leave linears dense), strs (ASVD's search, likewise), or a JSON/YAML file of linear (a regular "
        "expression): rank or dense.",
        show_default="loss",
        rich_help_panel="Allocation",
    ),
]
ProbeShare = Annotated[
    float | None,
    typer.Option(
        help="Most of the work of calibration and probing together that probing may be (loss, strs); decides how many "
        "tokens.",
        show_default="0.5",
        rich_help_panel="Allocation",
    ),
]
StrsRatios = Annotated[
    str | None,
    typer.Option(
        help="Ratios at which each linear alone is tried, like 0.2,0.4,0.6,0.8; fewer leave more tokens for each (strs).",
        show_default="0.1,0.2,...,0.9",
        rich_help_panel="Allocation",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Linears that stay dense; may be repeated. Searched in names like model.layers.0.mlp.up_proj.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX=RATIO",
        help="Another ratio for some linears; may be repeated, the first match wins, 0 leaves dense.",
        show_default=False,
        rich_help_panel="Method",
    ),
]
RoundTo = Annotated[
    int | None,
    typer.Option(
        help="Make ranks multiples of this, as kernels and group-wise quantisers like them.",
        show_default="8",
        rich_help_panel="Method",
    ),
]
Elastic = Annotated[
    bool | None,
    typer.Option(
        "--elastic/--no-elastic",
        help="Also write what every smaller size needs: svdllm slice then makes it in seconds, without text.",
        show_default="no-elastic",
        rich_help_panel="Recipe",
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: python-docs (built in), wikitext2, c4, ptb; owner/name[:config][:split][:field] on the "
        "hub; a .txt, .jsonl, .json or .parquet file[:field]; or a mixture a:0.7,b:0.3.",
        show_default="wikitext2",
        rich_help_panel="Calibration",
    ),
]
Samples = Annotated[
    int | None, typer.Option(help="Calibration windows.", show_default="256", rich_help_panel="Calibration")
]
Seqlen = Annotated[
    int | None, typer.Option(help="Tokens of a window.", show_default="2048", rich_help_panel="Calibration")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the random windows.", show_default="3", rich_help_panel="Calibration")
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", show_default="auto", rich_help_panel="Machine")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="What is computed in: auto is float32 on a CPU, the model's own on a GPU. Files keep the model's.",
        show_default="auto",
        rich_help_panel="Machine",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens in a block at once; lower it when memory is short.", show_default="4096", rich_help_panel="Machine"
    ),
]
HiddenStatesLimit = Annotated[
    str | None,
    typer.Option(
        help="Hidden states beyond this, like 8GB, go to disk.",
        show_default="half of the free memory",
        rich_help_panel="Machine",
    ),
]


def build_recipe(
    *,
    preset: str | None,
    recipe_file: Path | None,
    ratio: str | None,
    target_params: str | None,
    target_size: str | None,
    ignore: list[str] | None,
    override: list[str] | None,
    strs_ratios: str | None,
    **flags: Any,
) -> Recipe:
    """Preset, then recipe file, then flags; a budget on the command line takes the place of the file's."""
    settings = {} if preset is None else preset_settings(preset)
    if recipe_file is not None:
        settings |= load_settings(recipe_file)
    given = {name: value for name, value in flags.items() if value is not None}
    if ratio is not None:
        ratios = ratios_of(ratio, "--ratio")
        given["ratio"] = ratios[0] if len(ratios) == 1 else ratios
    if strs_ratios is not None:
        given["strs_ratios"] = ratios_of(strs_ratios, "--strs-ratios")
    if target_params is not None:
        given["target_params"] = parse_amount(target_params, what="--target-params", bytes_allowed=False)
    if target_size is not None:
        given["target_size"] = parse_amount(target_size, what="--target-size", bytes_allowed=True)
    if ignore:
        given["ignore"] = ignore
    if override:
        given["overrides"] = _overrides(override)
    if (allocation := given.get("allocation")) is not None and allocation not in ALLOCATIONS:
        given["ranks"] = allocation_file(given.pop("allocation"))
        settings = {name: value for name, value in settings.items() if name not in ("allocation", "round_to")}
    if any(name in given for name in BUDGETS):
        settings = {name: value for name, value in settings.items() if name not in (*BUDGETS, *OF_A_BUDGET)}
    if given.get("factor_bits") == 4 and settings.get("round_to", NVFP4_GROUP) % NVFP4_GROUP:
        settings["round_to"] = NVFP4_GROUP
    recipe = make_recipe(settings | given, origin=f"Recipe {recipe_file}" if recipe_file else "The options")
    for flag, (setting, values) in ONLY_WITH.items():
        if flag in given and getattr(recipe, setting) not in values:
            raise InputError(
                f"--{flag.replace('_', '-')} does nothing here: it is for {setting} {' or '.join(values)}, and this recipe "
                f"has {getattr(recipe, setting)}. Leave it out, or choose --{setting} {values[0]}."
            )
    if "gradient_samples" in given and not recipe.needs_gradients:
        raise InputError(
            f"--gradient-samples does nothing here: metric {recipe.metric} of method {recipe.method} takes no gradients. "
            "Leave it out, or choose --metric two-sided or --method fwsvd."
        )
    recipe.require_budget()
    return recipe


def hidden_states_limit(text: str | None) -> int | None:
    return None if text is None else parse_amount(text, what="--hidden-states-limit", bytes_allowed=True)


def ratios_of(text: str, option: str) -> tuple[float, ...]:
    return tuple(ratio_of(part, option) for part in text.split(","))


def ratio_of(text: str, option: str, least: str = "above 0") -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (0 < value < 1 or (value == 0 and least == "from 0")):
        raise InputError(
            f"{option} {text.strip()!r} is not a ratio: expected a number {least} and below 1, the share of the linears' "
            "parameters to remove (0.2 removes 20 %)."
        )
    return value


def _overrides(texts: list[str]) -> dict[str, float]:
    pairs = list(map(_override, texts))
    patterns = [pattern for pattern, _ in pairs]
    twice = sorted({pattern for pattern in patterns if patterns.count(pattern) > 1})
    if twice:
        raise InputError(f"--override names {', '.join(twice)} twice; give each pattern one ratio.")
    return dict(pairs)


def _override(text: str) -> tuple[str, float]:
    pattern, equals, ratio = text.rpartition("=")
    if not equals or not pattern:
        raise InputError(f"--override {text!r} is not of the form REGEX=RATIO, as in 'mlp.down_proj=0.1'.")
    return pattern, ratio_of(ratio, f"--override {pattern}", least="from 0")
