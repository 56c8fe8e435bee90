"""Python code as text: the interpreter's own library without its documentation, in two halves that share no module.

One half is for calibration and the other is held out. Docstrings are left out, tests and tables of data too.

    python benchmarks/code_text.py calibration code-calibration.txt --bytes 1000000
    python benchmarks/code_text.py held-out code-held-out.txt --bytes 1000000
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
HALVES = ("calibration", "held-out")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "lib2to3"}


def code_text(half: str, most_bytes: int, library: Path | None = None) -> str:
    """Files of one half in an order that mixes the packages, until there are enough bytes; the last one is cut."""
    library = library or Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for file in modules(half, library):
        parts.append(without_docstrings(file.read_text(encoding="utf-8", errors="replace")))
        size += len(parts[-1].encode())
        if size >= most_bytes:
            break
    return "\n\n".join(parts).encode()[:most_bytes].decode(errors="ignore")


def modules(half: str, library: Path) -> Iterator[Path]:
    """The modules of a half, by the hash of their names; a package is in one half as a whole."""
    names = {file: file.relative_to(library) for file in library.rglob("*.py")}
    chosen = {file: _digest(name.as_posix()) for file, name in names.items() if not LEFT_OUT & set(name.parts)}
    for file in sorted(chosen, key=lambda file: chosen[file]):
        if _digest(names[file].parts[0])[-1] % 2 == HALVES.index(half):
            yield file


def without_docstrings(source: str) -> str:
    """The lines of a module that belong to no docstring; nothing of a module that does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    documentation: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            documentation |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(line for number, line in lines if number not in documentation)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    args = parser.parse_args()
    args.output.write_text(code_text(args.half, args.bytes), encoding="utf-8")


if __name__ == "__main__":
    main()
