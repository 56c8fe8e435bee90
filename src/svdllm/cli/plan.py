"""``svdllm plan``: what a run would do, from configs and shapes."""

from __future__ import annotations

import typer

from svdllm.cli import options as o
from svdllm.cli.console import print_json, print_warning, show
from svdllm.cli.tables import plan_table
from svdllm.compression.plan import plan as make_plans


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    model: o.Model,
    ratio: o.Ratio = None,
    target_params: o.TargetParams = None,
    target_size: o.TargetSize = None,
    factor_bits: o.FactorBits = None,
    target_speedup: o.TargetSpeedup = None,
    speedup_tokens: o.SpeedupTokens = None,
    preset: o.Preset = None,
    recipe: o.RecipeFile = None,
    method: o.Method = None,
    asvd_alpha: o.AsvdAlpha = None,
    metric: o.Metric = None,
    gradient_samples: o.GradientSamples = None,
    shrinkage: o.Shrinkage = None,
    calibration: o.CalibrationMode = None,
    beta: o.Beta = None,
    bias_correction: o.BiasCorrection = None,
    joint_kv: o.JointKV = None,
    allocation: o.Allocation = None,
    probe_share: o.ProbeShare = None,
    strs_ratios: o.StrsRatios = None,
    ignore: o.Ignore = None,
    override: o.Override = None,
    round_to: o.RoundTo = None,
    elastic: o.Elastic = None,
    samples: o.Samples = None,
    seqlen: o.Seqlen = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_tokens: o.BatchTokens = None,
    hidden_states_limit: o.HiddenStatesLimit = None,
    revision: o.Revision = None,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Shows what [bold]compress[/bold] would do: linears, ranks, parameters, file size, memory, disk and time.

    Reads configs and file headers only, no weights; takes seconds for a model of any size.
    """
    resolved = o.build_recipe(
        preset=preset,
        recipe_file=recipe,
        ratio=ratio,
        target_params=target_params,
        target_size=target_size,
        factor_bits=factor_bits,
        target_speedup=target_speedup,
        speedup_tokens=speedup_tokens,
        ignore=ignore,
        override=override,
        method=method,
        asvd_alpha=asvd_alpha,
        metric=metric,
        gradient_samples=gradient_samples,
        shrinkage=shrinkage,
        calibration_mode=calibration,
        beta=beta,
        bias_correction=bias_correction,
        joint_kv=joint_kv,
        allocation=allocation,
        probe_share=probe_share,
        strs_ratios=strs_ratios,
        round_to=round_to,
        elastic=elastic,
        samples=samples,
        seqlen=seqlen,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
    )
    plans = make_plans(
        model,
        resolved,
        offline=offline,
        revision=revision,
        hidden_states_limit=o.hidden_states_limit(hidden_states_limit),
    )
    if json:
        print_json([single.to_dict() for single in plans] if len(plans) > 1 else plans[0].to_dict())
        return
    for single in plans:
        show(plan_table(single))
    for warning in plans[0].warnings:
        print_warning(warning)
