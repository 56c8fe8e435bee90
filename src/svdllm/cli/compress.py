"""``svdllm compress``: a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show
from svdllm.cli.tables import result_table
from svdllm.compression.run import compress_many


def register(app: typer.Typer) -> None:
    app.command("compress")(compress)


def compress(
    model: o.Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder to make; with several ratios it gets one folder each.", show_default=False
        ),
    ],
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
    calib: o.Calib = None,
    samples: o.Samples = None,
    seqlen: o.Seqlen = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    batch_tokens: o.BatchTokens = None,
    hidden_states_limit: o.HiddenStatesLimit = None,
    revision: o.Revision = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a killed run of the same settings, or start over.")
    ] = True,
    offline: o.Offline = False,
    json: o.Json = False,
) -> None:
    """Compresses a model and writes a checkpoint that [bold]from_pretrained[/bold] loads.

    Without a network: [bold]svdllm compress MODEL -o OUT --ratio 0.2 --calib python-docs --samples 64 --seqlen 512[/bold]

    A killed run is taken up by the same command: finished blocks lie in OUT.partial until the end.
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
        calibration=calib,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
    )
    results = compress_many(
        model,
        resolved,
        output,
        offline=offline,
        revision=revision,
        resume=resume,
        hidden_states_limit=o.hidden_states_limit(hidden_states_limit),
        reporter=ConsoleReporter(),
    )
    if json:
        print_json([result.to_dict() for result in results] if len(results) > 1 else results[0].to_dict())
        return
    for result in results:
        show(result_table(result))
    folder = results[0].output_dir
    console.print("Next:", style="bold")
    console.print(f"  svdllm eval {folder} --base {model} --ppl python-docs --seqlen 512", soft_wrap=True)
    console.print(f"  svdllm inspect {folder}", soft_wrap=True)
    if resolved.factor_bits is not None:
        into = folder.with_name(f"{folder.name}-{resolved.factor_bits}bits")
        console.print(f"  svdllm quantize {folder} -o {into} --bits {resolved.factor_bits}", soft_wrap=True)
    if resolved.elastic:
        console.print(f"  svdllm slice {folder} --ratio ... -o ...", soft_wrap=True)
