"""``svdllm plan``: what a run would do, from configs and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from svdllm.cli import options as o
from svdllm.cli import recipe_options as r
from svdllm.cli.commands import takes
from svdllm.cli.console import print_json, print_warning, show
from svdllm.cli.libraries import without_garbage_collection
from svdllm.cli.readers import read_bytes


@takes(r.recipe_options)
def plan(
    model: o.Model,
    output: Annotated[
        Path | None,
        o.option("Folder of the run, which is checked and not made.", None, False, "-o", "--output"),
    ] = None,
    preset: r.Preset = None,
    recipe: r.RecipeFile = None,
    hidden_states_limit: r.HiddenStatesLimit = None,
    processes: Annotated[
        int, o.option("Processes that share the run, each on a device of its own.", o.MACHINE, True, min=1)
    ] = 1,
    revision: o.Revision = None,
    resume: Annotated[bool, o.option("Ignored: nothing is begun.", None, False, "--resume/--no-resume")] = True,
    offline: o.Offline = False,
    json: o.Json = False,
    **settings: Any,
) -> None:
    """Shows what [bold]compress[/bold] would do: linears, ranks, parameters, file size, memory, disk and time.

    Takes the options of [bold]svdllm compress[/bold]: change the verb of a command to plan it.

    Reads configs and file headers only, no weights; takes seconds for a model of any size.
    """
    with without_garbage_collection():
        from svdllm.checkpoint.output import require_free_output
        from svdllm.cli.plan_tables import plan_table
        from svdllm.compression.plan import plan as make_plans

        resolved = r.build_recipe(preset, recipe, settings)
        if output is not None:
            require_free_output(output)
        plans = make_plans(
            model,
            resolved,
            offline=offline,
            revision=revision,
            hidden_states_limit=None if hidden_states_limit is None else read_bytes(hidden_states_limit, r.LIMIT),
            processes=processes,
        )
    if json:
        print_json([single.to_dict() for single in plans] if len(plans) > 1 else plans[0].to_dict())
        return
    for single in plans:
        show(plan_table(single))
    for warning in plans[0].warnings:
        print_warning(warning)
