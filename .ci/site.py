"""Writes the pages of the site to a folder: those of docs/, and one for every file outside docs/ that they link to.

The links in docs/ are those of the repository, so they work there as well as on the site. Formulas become MathML, which
browsers show without a script. `make docs` runs it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\s][^$]*?)\$(?![\w$])", re.DOTALL)
UNBROKEN = re.compile(r"(?<=\d) ([±/]) (?=\d)")  # figures in narrow tables
BEFORE_UNIT = re.compile(r"(?<=\d) (?=%|(?:M|kB|MB|GB|ms|s|min|million)\b)")
PRIME = re.compile(r"<msup><mi>(\w)</mi><mi>&#x02032;</mi></msup>")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder)
    pages = sorted(DOCS.rglob("*.md")) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    seen = set(pages)
    while pages:
        path = pages.pop()
        written = folder / site_path(path)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(page_of(path), encoding="utf-8")
        outside = {target for target in targets(path) if DOCS not in target.parents and target.name != "docs"}
        pages += sorted(outside - seen)
        seen |= outside


def page_of(path: Path) -> str:
    """The Markdown of a page, the text of a program, or the texts in a folder."""
    if path.suffix == ".md":
        return without_code(path.read_text(encoding="utf-8"), lambda text: rendered(text, path))
    files = sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
    blocks = [f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}````\n" for file in files]
    headings = [f"## {file.name}\n\n" if path.is_dir() else "" for file in files]
    body = "\n".join(heading + block for heading, block in zip(headings, blocks, strict=True))
    return f"# {path.relative_to(ROOT).as_posix()}\n\n{body}"


def rendered(text: str, page: Path) -> str:
    def on_site(link: re.Match[str]) -> str:
        target = linked(page, link[1])
        return os.path.relpath(site_path(target), site_path(page).parent)

    def as_mathml(formula: re.Match[str]) -> str:
        if formula["block"]:
            return f'<div class="formula">{with_primes(convert(formula["block"], "block"))}</div>'
        # In a span, because Markdown takes a line that begins with <math> for a block.
        return f"<span>{with_primes(convert(formula['inline']))}</span>"

    text = FORMULA.sub(as_mathml, LINK.sub(on_site, text))
    return BEFORE_UNIT.sub("\u00a0", UNBROKEN.sub("\u00a0\\1\u00a0", text))


def with_primes(mathml: str) -> str:
    """Primes of their full size: those in fonts for formulas are raised already."""
    return PRIME.sub(r'<mrow><mi>\1</mi><mo lspace="0" rspace="0">&#x02032;</mo></mrow>', mathml)


def without_code(text: str, change: Callable[[str], str]) -> str:
    """Changes a page between its pieces of code."""
    parts = CODE.split(text)
    parts[::2] = [change(part) for part in parts[::2]]
    return "".join(parts)


def targets(page: Path) -> set[Path]:
    if page.suffix != ".md":
        return set()
    text = "".join(CODE.split(page.read_text(encoding="utf-8"))[::2])
    return {linked(page, link) for link in LINK.findall(text)}


def linked(page: Path, link: str) -> Path:
    target = (page.parent / link).resolve()
    if not target.exists() or ROOT not in target.parents:
        raise SystemExit(f"{page.relative_to(ROOT)} links to {link}, which does not exist in the repository")
    return target


def site_path(path: Path) -> Path:
    """Where a file of the repository is on the site: its own place under docs/, else under source/."""
    if path == DOCS:
        return Path("index.md")
    if DOCS in path.parents:
        return path.relative_to(DOCS)
    place = Path("source") / path.relative_to(ROOT)
    return (
        place if path.suffix == ".md" else place / "index.md" if path.is_dir() else place.with_name(f"{path.name}.md")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
