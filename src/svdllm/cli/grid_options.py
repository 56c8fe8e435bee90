"""The options that compare and ablate share, and the calibration, training and measures that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from svdllm.cli import options as o
from svdllm.cli.generated import options_of
from svdllm.cli.options import option
from svdllm.cli.readers import read_bytes, read_names, read_ratio_list
from svdllm.common.errors import InputError
from svdllm.common.run_options import RunOptions

if TYPE_CHECKING:
    from svdllm.comparison import Measures

# Settings of a recipe that all methods share.
CALIBRATION = ("calibration", "samples", "seqlen", "seed", "device", "dtype")

Output = Annotated[Path, option("Folder of the report; a killed run continues in it.", None, False, "-o", "--output")]
EQUAL_BYTES = "equal-bytes"
Ratios = Annotated[
    str,
    option(
        f"Shares of the linears' parameters to remove; {EQUAL_BYTES} for those at which models are as large as the "
        "simulated ones among the methods.",
        None,
        True,
    ),
]
TargetSize = Annotated[
    str | None, option("Sizes of the weight files, as in 100MB,80MB, in place of --ratios; in the model's own dtype.")
]
Recover = Annotated[
    str | None,
    option(
        "Settings of the training of methods written with +, as YAML: 'data: alpaca.json, steps: 20', or a file. The "
        "names are those of svdllm recover --help."
    ),
]
Title = Annotated[str | None, option("Title of the report.", None, "by the model's name")]
Keep = Annotated[bool, option("Keep every checkpoint, in OUTPUT/checkpoints.", None, False, "--keep")]
Bench = Annotated[
    bool,
    option(
        "Measure prefill and decode of every model in turns with the dense one, in the end; keeps every checkpoint.",
        "Measuring",
        False,
        "--bench",
    ),
]
Ppl = Annotated[
    list[str] | None,
    option(
        "Texts to measure perplexity on, as in wikitext2,c4; may be repeated. none measures nothing.",
        "Measuring",
        "python-docs",
    ),
]
PplSeqlen = Annotated[
    int | None, option("Tokens of a perplexity window.", "Measuring", "2048, or the model's context if it is shorter")
]
PplWindows = Annotated[int | None, option("First perplexity windows that are measured.", "Measuring", "all")]
Tasks = Annotated[str | None, option("Tasks of lm-evaluation-harness, as in arc_easy,piqa.", "Measuring")]
TaskData = Annotated[Path | None, option("Folder with the tasks' data, instead of the hub.", "Measuring")]
Limit = Annotated[int | None, option("First examples of every task that are measured.", "Measuring", "all")]
NumFewshot = Annotated[
    int | None, option("Examples shown before each question.", "Measuring", "what the task's definition says")
]
Prompts = Annotated[
    Path | None,
    option("Text file with a prompt in each line; the report shows how every model continues it.", "Measuring"),
]
NewTokens = Annotated[int, option("Tokens to write after each prompt; 0 for no prompts.", "Measuring", True)]


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """The options of compare and ablate, apart from the methods and the settings of the calibration."""

    ratios: Ratios
    target_size: TargetSize = None
    recover: Recover = None
    title: Title = None
    keep: Keep = False
    bench: Bench = False
    ppl: Ppl = None
    ppl_seqlen: PplSeqlen = None
    ppl_windows: PplWindows = None
    tasks: Tasks = None
    task_data: TaskData = None
    limit: Limit = None
    num_fewshot: NumFewshot = None
    prompts: Prompts = None
    new_tokens: NewTokens
    revision: o.Revision = None
    offline: o.Offline = False
    json: o.Json = False

    def different_ratios(self, model: str) -> tuple[float, ...]:
        """The ratios, or those at which files of ``model`` have the sizes asked for.

        Raises:
            InputError: a ratio or a size is not one, cannot be reached, or is given twice.
        """
        if self.target_size is None:
            flag, text = "--ratios", self.ratios
            ratios = read_ratio_list(text, flag)
        else:
            from svdllm.comparison.target_sizes import ratios_of_sizes

            flag, text = "--target-size", self.target_size
            options = RunOptions(offline=self.offline, revision=self.revision)
            ratios = ratios_of_sizes(model, [read_bytes(size, flag) for size in read_names(text)], options)
        if len(set(ratios)) < len(ratios):
            raise InputError(f"{flag} {text!r} names {'a ratio' if flag == '--ratios' else 'a size'} twice.")
        return ratios

    def training(self) -> dict[str, Any] | None:
        """The mapping of --recover, which is YAML or a file of it."""
        return None if self.recover is None else _mapping(self.recover)

    def measures(self, config: Any, device: str, dtype: str) -> Measures:
        """How every model is measured; perplexity windows fit the context of the model with this ``config``."""
        from svdllm.comparison import Measures
        from svdllm.comparison.settings import PROMPTS
        from svdllm.data.specs import split_specs
        from svdllm.evaluation.side_by_side import SEQLEN
        from svdllm.models.limits import within_context

        self._check_measures()
        lines = PROMPTS if self.prompts is None else _prompts(self.prompts)
        measures = Measures(
            texts=tuple(text for text in split_specs(self.ppl or ["python-docs"]) if text != "none"),
            seqlen=within_context(config, SEQLEN) if self.ppl_seqlen is None else self.ppl_seqlen,
            windows=self.ppl_windows,
            tasks=read_names(self.tasks or ""),
            task_data=self.task_data,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            prompts=lines if self.new_tokens else (),
            new_tokens=self.new_tokens,
            device=device,
            dtype=dtype,
        )
        if not (measures.texts or measures.tasks or measures.prompts):
            raise InputError("Nothing to measure: give --ppl, --tasks or prompts.")
        return measures

    def _check_measures(self) -> None:
        least = {"--ppl-seqlen": (self.ppl_seqlen, 2), "--ppl-windows": (self.ppl_windows, 1)}
        for flag, (value, bound) in (least | {"--new-tokens": (self.new_tokens, 0)}).items():
            if value is not None and value < bound:
                raise InputError(f"{flag} must be at least {bound}, found {value}.")
        if self.tasks is None and (self.task_data, self.limit, self.num_fewshot) != (None, None, None):
            raise InputError("--task-data, --limit and --num-fewshot do nothing without --tasks.")
        if self.prompts is not None and not self.new_tokens:
            raise InputError("--prompts does nothing with --new-tokens 0: say how many tokens to write after each.")


def shared_options(own: Callable[[], list[Parameter]], **defaults: Any) -> Callable[[], list[Parameter]]:
    """A command's ``own`` options, then those of ``GridOptions`` with these defaults, then those of the calibration."""

    def make() -> list[Parameter]:
        from svdllm.compression.recipe import Recipe

        shared = signature(GridOptions, eval_str=True).parameters.values()
        options = [option.replace(default=defaults.get(option.name, option.default)) for option in shared]
        return [*own(), *options, *options_of(Recipe, CALIBRATION)]

    return make


def split(options: dict[str, Any]) -> tuple[GridOptions, dict[str, Any]]:
    """The options of both commands, and the flags of the calibration."""
    calibration = {name: options.pop(name) for name in CALIBRATION}
    return GridOptions(**options), calibration


def _mapping(text: str) -> dict[str, Any]:
    import yaml

    try:
        file = Path(text)
        is_file = file.suffix in (".yaml", ".yml")
        settings = yaml.safe_load(file.read_text(encoding="utf-8") if is_file else "{" + text.strip(" {}") + "}")
    except OSError as error:
        raise InputError(f"--recover {text}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--recover {text!r} is not a YAML mapping like 'data: alpaca.json, steps: 20'.") from error
    if not isinstance(settings, dict):
        raise InputError(f"--recover {text!r}: expected a mapping like 'data: alpaca.json, steps: 20'.")
    return settings


def _prompts(file: Path) -> tuple[str, ...]:
    try:
        lines = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file} cannot be read: {error}") from error
    if not lines:
        raise InputError(f"--prompts {file} holds no prompt: write one in each line.")
    return lines
