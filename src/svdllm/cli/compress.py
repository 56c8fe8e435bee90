"""``svdllm compress``: a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from svdllm.cli import options as o
from svdllm.cli import recipe_options as r
from svdllm.cli.commands import takes
from svdllm.cli.console import ConsoleReporter, print_json, show, show_next
from svdllm.cli.readers import read_bytes
from svdllm.common.processes import is_first

if TYPE_CHECKING:
    from svdllm.compression.recipe import Recipe


@takes(r.recipe_options)
def compress(
    model: o.Model,
    output: Annotated[
        Path, o.option("Folder to make; with several ratios it gets one folder each.", None, False, "-o", "--output")
    ],
    preset: r.Preset = None,
    recipe: r.RecipeFile = None,
    hidden_states_limit: r.HiddenStatesLimit = None,
    revision: o.Revision = None,
    resume: o.Resume = True,
    offline: o.Offline = False,
    json: o.Json = False,
    **settings: Any,
) -> None:
    """Compresses a model and writes a checkpoint that [bold]from_pretrained[/bold] loads.

    Without a network:
    [bold]svdllm compress MODEL -o OUT --ratio 0.2 --calib python-docs --samples 64 --seqlen 512[/bold]

    The same command line with plan in place of compress shows what it would do.

    A killed run is continued by the same command: finished blocks lie in OUT.partial until the end.

    Several processes or GPUs: torchrun --nproc-per-node N -m svdllm compress ... The result has the same bytes.
    """
    from svdllm.cli.tables import result_table
    from svdllm.compression.run import compress_many

    resolved = r.build_recipe(preset, recipe, settings)
    results = compress_many(
        model,
        resolved,
        output,
        offline=offline,
        revision=revision,
        resume=resume,
        hidden_states_limit=None if hidden_states_limit is None else read_bytes(hidden_states_limit, r.LIMIT),
        reporter=ConsoleReporter(),
    )
    if not is_first():
        return
    if json:
        print_json([result.to_dict() for result in results] if len(results) > 1 else results[0].to_dict())
        return
    for result in results:
        show(result_table(result))
    show_next(*_next_commands(model, results[0].output_dir, resolved))


def _next_commands(model: str, folder: Path, recipe: Recipe) -> list[str]:
    commands = [f"eval {folder} --base {model} --ppl python-docs --seqlen 512", f"inspect {folder}"]
    if (bits := recipe.factor_bits) is not None:
        commands.append(
            f"quantize {folder} -o {folder.with_name(f'{folder.name}-{bits}bits')} --bits {bits} --format torchao"
        )
    if recipe.elastic:
        commands.append(f"slice {folder} --ratio ... -o ...")
    return commands
