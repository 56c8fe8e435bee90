"""Prints what is installed of the packages in constraints.txt: a name and a version in every line."""

import contextlib
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

text = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
for name in sorted(set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))):
    with contextlib.suppress(PackageNotFoundError):
        print(name, version(name))
