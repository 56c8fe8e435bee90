"""The result of ``svdllm quantize`` as a table."""

from __future__ import annotations

from svdllm.cli.console import duration, size
from svdllm.cli.tables import Titled, summary_table
from svdllm.export.quantize import QuantizationResult


def quantization_table(result: QuantizationResult) -> Titled:
    """The linears by the bits they are stored in, and what was left as it was."""
    table = summary_table()
    for scheme, number in result.by_scheme().items():
        table.add_row("linears", f"{number} in {scheme}")
    others = [linear for linear in result.linears if linear.reason]
    if others:
        table.add_row("", f"{len(others)} of them for their shape, as {others[0].name}: {others[0].reason}")
    for reason in dict.fromkeys(result.left.values()):
        names = [name for name, why in result.left.items() if why == reason]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        table.add_row("left as it was", f"{', '.join(names[:3])}{more} ({reason})")
    table.add_row("weight files", f"{size(result.bytes_before)} -> {size(result.bytes_after)}")
    table.add_row("time", duration(sum(result.seconds.values())))
    return str(result.output_dir), [table]
