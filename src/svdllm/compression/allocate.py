"""Chooses a form and a size for every linear, by what the analysis, the probes and the clock tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from svdllm.checkpoint.elastic import Probes
from svdllm.common.files import write_atomically
from svdllm.compression.analysis import Analysis
from svdllm.compression.forms import corrected_bits
from svdllm.compression.plan import Plan, refine
from svdllm.compression.probe import probe, probe_ids, probe_sizes, probe_tokens
from svdllm.compression.ranks import ALLOCATIONS, Evidence
from svdllm.compression.ranks.budget import require_fast_enough
from svdllm.compression.ranks.given import free_and_fixed
from svdllm.compression.ranks.linear_times import LinearTimes
from svdllm.compression.ranks.measure_linears import measure_linears
from svdllm.compression.session import Run
from svdllm.compression.subject import Subject
from svdllm.data import TokenWindows

LINEAR_TIMES_FILE = "linear-times.json"


def measure_times(run: Run, subject: Subject) -> LinearTimes | None:
    """Measures how long the linears take on this machine; None unless time is the budget.

    A resumed run takes the times that it measured first, so that its choices stay the same.

    Raises:
        InputError: not even the least sizes are as fast as the budget asks.
    """
    recipe = run.recipe
    if recipe.target_speedup is None:
        return None
    file = run.analysis_folder / LINEAR_TIMES_FILE
    if run.processes.is_first and not file.is_file():
        _, fixed = free_and_fixed(recipe, subject.structure.targets)
        device, dtype = subject.placement(recipe)
        measured = measure_linears(
            subject.skeleton,
            subject.structure,
            forms=(*recipe.used_forms, *(chosen.form for chosen in fixed.values())),
            tokens=recipe.speedup_tokens,
            round_to=recipe.round_to,
            device=device,
            dtype=dtype,
            reporter=run.reporter,
        )
        write_atomically(file, measured.to_json().encode())
    run.processes.wait()
    times = LinearTimes.read(file)
    require_fast_enough(recipe, subject.structure, times)
    return times


def allocate(
    run: Run,
    subject: Subject,
    windows: TokenWindows | None,
    plans: Sequence[Plan],
    analysis: Analysis,
    times: LinearTimes | None,
) -> list[Plan]:
    """The plans with the forms that their allocation chooses; as they are where shapes were enough to plan them.

    Raises:
        NumericalError: a probe is not finite; names the linear.
    """
    if not ALLOCATIONS[run.recipe.allocation].needs_spectra:
        return list(plans)
    structure = subject.structure
    evidence = Evidence({target.name: analysis.energies(target) for target in structure.targets})
    if run.recipe.needs_probes:
        assert windows is not None
        probes = _probes(run, subject, windows, analysis, plans[0])
        narrowings = {
            mlp.name: analysis.narrowing_tails(mlp.block, mlp.name)
            for mlp in structure.mlps
            if (mlp.pool or mlp.name) in probes
        }
        roundings = {t.name: errors for t in structure.targets if (errors := analysis.rounding(t)) is not None}
        corrected = corrected_bits(run.recipe.used_forms)
        corrections = {
            t.name: dict(zip(corrected, tails, strict=True))
            for t in structure.targets
            if corrected and (tails := analysis.corrections(t)) is not None
        }
        evidence = replace(
            evidence,
            probes=probes,
            times=times,
            narrowings=narrowings,
            roundings=roundings,
            corrections=corrections,
        )
    with run.reporter.stage("allocate", 1):
        return [refine(plan, subject, evidence) for plan in plans]


def _probes(run: Run, subject: Subject, windows: TokenWindows, analysis: Analysis, plan: Plan) -> Probes:
    """The effect of changing each linear and MLP alone; an earlier run's, if it tried the same sizes."""
    recipe, structure = run.recipe, subject.structure
    sizes = probe_sizes(recipe, structure)
    probes = analysis.read_probes(recipe.allocation)
    if {name: list(measured) for name, measured in probes.items()} != sizes:
        ids = probe_ids(windows.ids, probe_tokens(recipe, structure, subject.skeleton))
        walk = subject.walk(ids, recipe, run.spill_file(plan), run.scratch(plan))
        walk.batch_tokens = ids.numel()
        probing = ALLOCATIONS[recipe.allocation].probing
        assert probing is not None
        walk.processes = run.processes
        folder = run.work if plan.needs.hidden_states_on_disk else None
        probes = probe(walk, analysis, sizes, probing.measure, run.reporter, folder)
        walk.close()
        if run.processes.is_first:
            analysis.write_probes(recipe.allocation, probes)
    return probes
