"""The result of ``svdllm prune`` as a table."""

from __future__ import annotations

from svdllm.cli.console import count, duration, size
from svdllm.cli.tables import Titled, summary_table
from svdllm.pruning.run import PruningResult


def pruning_table(result: PruningResult) -> Titled:
    """The checkpoint that a pruning run made: size, time and memory."""
    sizes, table = result.sizes, summary_table()
    table.add_row("method", f"{result.settings.pruning}, {sizes.achieved_ratio:.2%} of the linears' parameters removed")
    table.add_row("parameters", f"{count(sizes.dense_params)} -> {count(sizes.params)}")
    table.add_row("weight files", f"{size(sizes.dense_file_bytes)} -> {size(sizes.file_bytes)}")
    table.add_row("time", duration(sum(result.seconds.values())))
    table.add_row("peak memory", size(result.peak_ram_bytes))
    return str(result.output_dir), [table]
