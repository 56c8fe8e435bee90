"""Prints the lower bounds of pyproject.toml as constraints for pip, of each name the first."""

import re
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
bounds: dict[str, str] = {}
for name, version in re.findall(r'"([A-Za-z][\w.-]*)(?:\[[\w,-]+\])?>=([\d.]+)', text):
    bounds.setdefault(name, version)
print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
