"""SVD-LLM from top to bottom: the paper's Algorithm 1 up to its update, in the order of the paper."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from svdllm.checkpoint.elastic import Probes
from svdllm.checkpoint.output import (
    FINISHED,
    LOCK,
    PARTIAL,
    Output,
    claim_work_folder,
    followed,
    remove_scratch,
    require_ours,
    start_over,
)
from svdllm.checkpoint.report import REPORT_FILE
from svdllm.checkpoint.tensors import buffer_names
from svdllm.common.device import resolve_device, resolve_dtype
from svdllm.common.disk import explain_full_disk
from svdllm.common.errors import InputError, ResourceError, SvdllmError
from svdllm.common.files import write_atomically
from svdllm.common.locks import locked
from svdllm.common.memory import device_peak_bytes, explain_out_of_memory, peak_bytes
from svdllm.common.progress import Reporter
from svdllm.common.settings_file import read_settings, refuse_other_settings
from svdllm.common.version import __version__
from svdllm.compression.analysis import Analysis, FinalFactors
from svdllm.compression.analyze import Calibration
from svdllm.compression.math.metrics import METHODS
from svdllm.compression.plan import Plan, calibration_warnings, discover_targets, plan_each_ratio
from svdllm.compression.probe import MEASURES, probe, probe_ids, probe_ranks, probe_tokens
from svdllm.compression.ranks import Evidence
from svdllm.compression.ranks.budget import require_fast_enough
from svdllm.compression.ranks.linear_times import LinearTimes, measure_linears
from svdllm.compression.recipe import Recipe
from svdllm.compression.records import CompressionResult, LinearRecord, Provenance, linear_record
from svdllm.compression.room import require_room
from svdllm.compression.sequential import Sequential
from svdllm.compression.write import write_checkpoint
from svdllm.data import TokenWindows, calibration_windows, check_source
from svdllm.models.limits import context_length, require_known_ids
from svdllm.models.open import Source, open_config, open_source
from svdllm.models.skeleton import build_skeleton
from svdllm.models.structure import Structure
from svdllm.models.walk import Walk
from svdllm.models.weights import survey

# Settings of a recipe that come after its analysis.
NOT_OF_THE_ANALYSIS = (
    "ratio",
    "target_params",
    "target_size",
    "factor_bits",
    "target_speedup",
    "speedup_tokens",
    "allocation",
    "strs_ratios",
    "overrides",
    "round_to",
    "elastic",
    "calibration_mode",
    "sequential_samples",
    "beta",
)
LINEAR_TIMES_FILE = "linear-times.json"
# A part of the batches is held out to choose beta.
LEAST_SEQUENTIAL_BATCHES = 8


def compress(
    model: str | Path | PreTrainedModel, recipe: Recipe, output_dir: str | Path, **options: Any
) -> CompressionResult:
    """Compresses a model to one size; see ``compress_many`` for the options and errors."""
    if isinstance(recipe.ratio, tuple) and len(recipe.ratio) > 1:
        raise InputError("The recipe has several ratios: use compress_many, which makes a checkpoint of each.")
    return compress_many(model, recipe.single()[0], output_dir, **options)[0]


def compress_many(
    model: str | Path | PreTrainedModel,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    calibration: str | Sequence[str] | Tensor | Any = None,
    tokenizer: Any = None,
    offline: bool = False,
    revision: str | None = None,
    resume: bool = True,
    hidden_states_limit: int | None = None,
    analysis_dir: str | Path | None = None,
    reporter: Reporter | None = None,
) -> list[CompressionResult]:
    """Compresses a model to every ratio of the recipe, with one calibration and one decomposition.

    Args:
        model: hub id, folder, GGUF file, or a model in memory, which is left as it was.
        recipe: the settings. With several ratios, ``output_dir`` gets one folder for each.
        output_dir: made by this call; must not exist, or be empty. Work in progress lies beside it, in
            ``<output_dir>.partial`` (in a mount point, in ``svdllm.partial``), and a killed run goes on from there.
        calibration: a list of strings, a ``datasets.Dataset`` or token ids (``windows x seqlen``), in place of the
            recipe's ``calibration``.
        tokenizer: for a model in memory; other models bring theirs.
        offline: never ask the hub.
        revision: of a hub id.
        resume: go on with an unfinished run in ``<output_dir>.partial``; otherwise start over.
        hidden_states_limit: bytes of hidden states kept in RAM before they go to disk; by default half of what is free.
        analysis_dir: a folder where the analysis is kept, for other ratios and allocations of the same calibration; a
            run whose calibration is in it already takes it from there.
        reporter: is told about stages and progress.

    Raises:
        InputError: a setting, path or text is wrong, or another run is writing to the output; nothing is left behind.
        UnsupportedModelError: the model's structure is not understood; names the modules.
        ResourceError: the disk or the memory does not suffice. Finished blocks are kept.
        NumericalError: a NaN or infinity; names the tensor, or block and batch.
    """
    if calibration is not None and not isinstance(calibration, str):
        recipe = recipe.model_copy(update={"calibration": f"given from Python ({type(calibration).__name__})"})
    reporter = reporter or Reporter()
    recipe = _within_context(recipe, model, offline, revision, reporter)
    run = _Run(
        model=model,
        recipe=recipe if not isinstance(calibration, str) else recipe.model_copy(update={"calibration": calibration}),
        output=Output.at(output_dir),
        calibration=recipe.calibration if calibration is None else calibration,
        tokenizer=tokenizer,
        offline=offline,
        revision=revision,
        resume=resume,
        hidden_states_limit=hidden_states_limit,
        analysis_dir=None if analysis_dir is None else followed(Path(analysis_dir)),
        reporter=reporter,
    )
    run.check_cheaply()
    with run.output.taken() as warning:
        if warning is not None:
            run.reporter.warn(warning)
        run.check_output()
        with run.cleaning_up():
            return run.execute()


def _within_context(
    recipe: Recipe, model: str | Path | PreTrainedModel, offline: bool, revision: str | None, reporter: Reporter
) -> Recipe:
    """The recipe, with windows that the model can take where nobody said how long they are."""
    if "seqlen" in recipe.model_fields_set or not recipe.needs_tokens:
        return recipe
    bounded = recipe.within(context_length(open_config(model, offline=offline, revision=revision).config))
    if bounded.seqlen < recipe.seqlen:
        reporter.note(f"Calibration windows have {bounded.seqlen} tokens: the model takes no more.")
    return bounded


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run, in the order in which it happens."""

    model: str | Path | PreTrainedModel
    recipe: Recipe
    output: Output
    calibration: Any
    tokenizer: Any
    offline: bool
    revision: str | None
    resume: bool
    hidden_states_limit: int | None
    analysis_dir: Path | None
    reporter: Reporter

    @property
    def work(self) -> Path:
        return self.output.work

    def check_cheaply(self) -> None:
        """What can be wrong without looking at the model."""
        self.recipe.require_budget()
        resolve_device(self.recipe.device)
        if self.recipe.needs_tokens:
            check_source(self.calibration)

    def check_output(self) -> None:
        """What can be wrong with what is at the place of the output."""
        require_ours(self.work)
        self.output.finish_completing()
        self.output.require_free(LOCK, PARTIAL)
        if self.resume and (found := read_settings(self.work / "analysis")):
            wanted = _recipe_settings(self.recipe)
            refuse_other_settings({key: found.get(key) for key in wanted}, wanted, self.work)

    @contextmanager
    def cleaning_up(self) -> Iterator[None]:
        """A run that fails leaves nothing behind, unless there is work worth going on with."""
        new = not self.work.exists()
        goes_on = "Finished blocks are kept: the same command goes on with them"
        advice = (
            f"{goes_on} when there is more memory. To start over with less, use --no-resume and lower --batch-tokens (now "
            f"{self.recipe.batch_tokens}) or --samples; `svdllm plan` tells what a run needs."
        )
        try:
            with explain_out_of_memory(advice), explain_full_disk(self.work, f"{goes_on}."):
                yield
        except SvdllmError as error:
            finished = any(self.work.glob("**/block-*.safetensors"))
            if new and not (finished and isinstance(error, ResourceError)):
                shutil.rmtree(self.work, ignore_errors=True)
            elif isinstance(error, ResourceError):
                remove_scratch(self.work)
            raise

    def execute(self) -> list[CompressionResult]:
        with self.reporter.stage("plan", 1):
            config_only = open_config(self.model, offline=self.offline, revision=self.revision)
            skeleton, structure = discover_targets(config_only, self.recipe)
            plans = plan_each_ratio(config_only, skeleton, structure, self.recipe, self.hidden_states_limit)
            require_room(self.output, max(plans, key=lambda plan: plan.disk_bytes))
        claim_work_folder(self.work)
        with self.reporter.stage("open", 1):
            source = config_only
            if source.weights is None:
                source = open_source(
                    self.model, offline=self.offline, revision=self.revision, gguf_folder=self.work / "source"
                )
                plans = plan_each_ratio(source, skeleton, structure, self.recipe, self.hidden_states_limit)
        windows = self._calibration_windows(source, skeleton, structure)
        fingerprint = self._survey(source, skeleton)
        if not self.resume or not read_settings(self.work / "analysis"):
            start_over(self.work)
        settings = self._settings(source, fingerprint, windows)
        Analysis(self.work / "analysis", settings).open()
        times = self._linear_times(source, skeleton, structure)
        with self._analysis(settings) as analysis:
            self._analyze(source, structure, plans, windows, analysis)
            evidence = self._evidence(source, skeleton, structure, windows, analysis, times)
        if evidence is not None:
            with self.reporter.stage("allocate", 1):
                known = plan_each_ratio(source, skeleton, structure, self.recipe, self.hidden_states_limit, evidence)
                plans = [plan.with_ranks_of(other) for plan, other in zip(plans, known, strict=True)]
        provenance = Provenance.of(source.name, source.revision, fingerprint, windows)
        finals = [self._sequential(source, structure, plan, windows, analysis) for plan in plans]
        return self._write(source, skeleton, structure, plans, analysis, finals, provenance)

    @contextmanager
    def _analysis(self, settings: dict[str, Any]) -> Iterator[Analysis]:
        """The analysis, which no other run writes to while the context lasts; afterwards it is only read."""
        if self.analysis_dir is None:
            yield Analysis(self.work / "analysis", settings)
            return
        with locked(self.analysis_dir / LOCK, self.analysis_dir) as warning:
            if warning is not None:
                self.reporter.warn(warning)
            analysis = Analysis(self.analysis_dir, analysis_settings(settings))
            analysis.open()
            yield analysis

    def _calibration_windows(
        self, source: Source, skeleton: PreTrainedModel, structure: Structure
    ) -> TokenWindows | None:
        """Algorithm 1, line 4: some text, as windows of tokens. None where nothing needs data."""
        if not self.recipe.needs_tokens:
            return None
        with self.reporter.stage("tokenise", 1):
            tokenizer = self.tokenizer
            if tokenizer is None and not isinstance(self.calibration, Tensor):
                if source.folder is None:
                    raise InputError(
                        "A model in memory needs its tokenizer (tokenizer=...), or token ids (calibration=...)."
                    )
                tokenizer = source.load_tokenizer(self.offline)
            windows = calibration_windows(
                self.calibration,
                tokenizer,
                samples=self.recipe.samples,
                seqlen=self.recipe.seqlen,
                seed=self.recipe.seed,
                offline=self.offline,
            )
        require_known_ids(windows.ids, source.config, tokenizer)
        for warning in calibration_warnings(structure, skeleton, self.recipe, windows.num_tokens):
            self.reporter.warn(warning)
        return windows

    def _survey(self, source: Source, skeleton: PreTrainedModel) -> str:
        assert source.weights is not None
        with self.reporter.stage("check weights", len(source.weights.names())):
            return survey(source.weights, buffer_names(skeleton), self.reporter.advance)

    def _settings(self, source: Source, fingerprint: str, windows: TokenWindows | None) -> dict[str, Any]:
        """All that decides the bytes of the result."""
        device = resolve_device(self.recipe.device)
        config = source.config.to_json_string(use_diff=False)
        return {
            **_recipe_settings(self.recipe),
            "device": str(device),
            "computed in": str(resolve_dtype(self.recipe.dtype, device, source.dtype)),
            "weights of the model": fingerprint,
            "config of the model": hashlib.sha256(config.encode()).hexdigest(),
            "calibration tokens": None if windows is None else windows.fingerprint,
            "svdllm version": __version__,
            "torch version": torch.__version__,
            "transformers version": transformers.__version__,
        }

    def _linear_times(self, source: Source, skeleton: PreTrainedModel, structure: Structure) -> LinearTimes | None:
        """Where time is the budget, how long linears take here; an unfinished run's, so that the ranks are the same."""
        if self.recipe.target_speedup is None:
            return None
        file = self.work / "analysis" / LINEAR_TIMES_FILE
        if not file.is_file():
            device = resolve_device(self.recipe.device)
            measured = measure_linears(
                skeleton,
                structure,
                tokens=self.recipe.speedup_tokens,
                round_to=self.recipe.round_to,
                device=device,
                dtype=resolve_dtype(self.recipe.dtype, device, source.dtype),
                reporter=self.reporter,
            )
            write_atomically(file, measured.to_json().encode())
        times = LinearTimes.read(file)
        require_fast_enough(self.recipe, structure, times)
        return times

    def _analyze(
        self, source: Source, structure: Structure, plans: list[Plan], windows: TokenWindows | None, analysis: Analysis
    ) -> None:
        """Algorithm 1, lines 5 to 9, and Algorithm 2: the statistics of the tokens and the spectrum of every weight."""
        ids = torch.zeros(1, 2, dtype=torch.long)  # where the method asks nothing of the text
        if windows is not None and METHODS[self.recipe.method].needs_tokens:
            ids = windows.ids
        walk = self._walk(source, structure, ids, spill=plans[0].hidden_states_on_disk)
        if self.recipe.needs_gradients:
            kept = min(self.recipe.gradient_samples, len(walk.ids))
            walk.kept_folder = self.work / "inputs"
            walk.kept_batches = sum(batch.start < kept for batch in walk.batches)
        Calibration(
            walk=walk,
            recipe=self.recipe,
            analysis=analysis,
            depths=_depths(structure, plans),
            keeps_left_metrics=self.recipe.calibration_mode == "sequential" or self.analysis_dir is not None,
            reporter=self.reporter,
        ).run()

    def _evidence(
        self,
        source: Source,
        skeleton: PreTrainedModel,
        structure: Structure,
        windows: TokenWindows | None,
        analysis: Analysis,
        times: LinearTimes | None,
    ) -> Evidence | None:
        """What the allocation is chosen by; None where shapes are enough."""
        if self.recipe.allocation == "uniform":
            return None
        energies = {target.name: analysis.energies(target) for target in structure.targets}
        if not self.recipe.needs_probes:
            return Evidence(energies)
        assert windows is not None
        return Evidence(energies, self._probes(source, skeleton, structure, windows, analysis), times)

    def _probes(
        self,
        source: Source,
        skeleton: PreTrainedModel,
        structure: Structure,
        windows: TokenWindows,
        analysis: Analysis,
    ) -> Probes:
        """What truncating each linear alone does to the model; an earlier run's, if it truncated to the same ranks."""
        allocation, ranks = self.recipe.allocation, probe_ranks(self.recipe, structure)
        probes = analysis.read_probes(allocation)
        if {name: list(measured) for name, measured in probes.items()} != ranks:
            ids = probe_ids(windows.ids, probe_tokens(self.recipe, structure, skeleton))
            walk = self._walk(source, structure, ids)
            walk.batch_tokens = ids.numel()
            probes = probe(walk, analysis, ranks, MEASURES[allocation], self.reporter)
            walk.close()
            analysis.write_probes(allocation, probes)
        return probes

    def _walk(self, source: Source, structure: Structure, ids: Tensor, *, spill: bool = False) -> Walk:
        assert source.weights is not None
        device = resolve_device(self.recipe.device)
        dtype = resolve_dtype(self.recipe.dtype, device, source.dtype)
        return Walk(
            weights=source.weights,
            skeleton=build_skeleton(source.config, dtype),
            structure=structure,
            ids=ids,
            device=device,
            dtype=dtype,
            batch_tokens=self.recipe.batch_tokens,
            spill_file=self.work / "hidden-states" if spill else None,
        )

    def _sequential(
        self, source: Source, structure: Structure, plan: Plan, windows: TokenWindows | None, analysis: Analysis
    ) -> FinalFactors | None:
        """Factors for the inputs that the compressed model makes itself; None where the bases are the factors."""
        if self.recipe.calibration_mode == "dense":
            return None
        assert windows is not None
        ids = windows.ids[: self.recipe.sequential_samples]
        walk = self._walk(source, structure, ids, spill=plan.hidden_states_on_disk)
        walk.two_streams = True
        walk.batch_tokens = min(walk.batch_tokens, max(1, ids.numel() // LEAST_SEQUENTIAL_BATCHES))
        finals = FinalFactors(self.work / "analysis" / f"sequential-{plan.achieved_ratio:.6f}")
        Sequential(
            walk=walk,
            ranks=plan.ranks,
            recipe=self.recipe,
            analysis=analysis,
            finals=finals,
            reporter=self.reporter,
        ).run()
        return finals

    def _write(
        self,
        source: Source,
        skeleton: PreTrainedModel,
        structure: Structure,
        plans: list[Plan],
        analysis: Analysis,
        finals: list[FinalFactors | None],
        provenance: Provenance,
    ) -> list[CompressionResult]:
        """Algorithm 1, lines 10 to 13: the factors of every weight, once per ratio."""
        singles = self.recipe.single()
        several = len(singles) > 1
        finished = self.work / FINISHED
        results = []
        for recipe, plan, final in zip(singles, plans, finals, strict=True):
            folder = finished / f"ratio-{recipe.ratio}" if several else finished
            linears = _linear_records(structure, plan, analysis)
            with self.reporter.stage("write", len(structure.blocks)):
                if not (folder / REPORT_FILE).is_file():
                    write_checkpoint(
                        folder,
                        source=source,
                        skeleton=skeleton,
                        structure=structure,
                        plan=plan,
                        recipe=recipe,
                        analysis=analysis,
                        finals=final,
                        provenance=provenance,
                        linears=linears,
                        tokenizer=self.tokenizer,
                        reporter=self.reporter,
                    )
            results.append(self._result(recipe, plan, linears, self.output.path / folder.relative_to(finished)))
        self.output.complete()
        return results

    def _result(self, recipe: Recipe, plan: Plan, linears: list[LinearRecord], folder: Path) -> CompressionResult:
        return CompressionResult(
            output_dir=folder,
            recipe=recipe,
            plan=plan,
            linears=linears,
            seconds=dict(self.reporter.seconds),
            peak_ram_bytes=peak_bytes(),
            peak_device_bytes=device_peak_bytes(resolve_device(recipe.device)),
            warnings=list(self.reporter.warnings),
        )


def analysis_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that decide its analysis: not the budget, nor how it is spread."""
    return {key: value for key, value in settings.items() if key.removeprefix("recipe: ") not in NOT_OF_THE_ANALYSIS}


def _recipe_settings(recipe: Recipe) -> dict[str, Any]:
    return {f"recipe: {key}": value for key, value in recipe.to_dict().items()}


def _depths(structure: Structure, plans: list[Plan]) -> dict[str, int]:
    """Directions of each basis to keep: up to break-even, so that any ratio is a slice, or more if a rank asks for it."""
    depths = {target.name: target.break_even_rank for target in structure.targets}
    for plan in plans:
        for name, rank in plan.ranks.items():
            depths[name] = max(depths[name], rank)
    return depths


def _linear_records(structure: Structure, plan: Plan, analysis: Analysis) -> list[LinearRecord]:
    return [
        linear_record(
            target,
            plan.ranks.get(target.name),
            analysis.energies(target),
            analysis.seconds(target.block).get(target.name, 0.0),
        )
        for target in structure.targets
    ]
