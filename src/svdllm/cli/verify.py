"""``svdllm verify``: is a checkpoint what was written?"""

from __future__ import annotations

from svdllm.cli import options as o
from svdllm.cli.console import console, print_json


def verify(folder: o.Checkpoint, device: o.Device = "auto", json: o.Json = False) -> None:
    """Checks hashes, shapes, that every weight is finite, and that the logits are those stored when it was written."""
    from svdllm.checkpoint.verify import verify as verify_checkpoint

    checks = verify_checkpoint(folder, device)
    if json:
        print_json({"folder": str(folder), "ok": True, "checks": dict(checks)})
        return
    for name, found in checks:
        console.print(f"ok  {name:<8} {found}")
