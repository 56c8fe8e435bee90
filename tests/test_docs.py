"""What the documentation names must exist: commands, options, targets of make, files, public names."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import svdllm
from svdllm.cli import COMMANDS, app
from svdllm.cli.commands import build

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
HELP = {"-h", "--help"}
OF_THE_PROGRAM = HELP | {option for parameter in get_command(app).params for option in parameter.opts}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
QUOTE = re.compile(r'"([^"]+)"')
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def options_by_command() -> dict[str, set[str]]:
    return {
        name: HELP | {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        for name, command in ((name, build(name, function)) for name, function in COMMANDS.items())
    }


OPTIONS = options_by_command()


def fenced(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def code_spans(text: str) -> list[str]:
    return INLINE_CODE.findall(FENCE.sub("", text))


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every shell line in a code block, and of every piece of code in a sentence."""
    for block in fenced(text, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.removeprefix("$ "), comments=True)
    for span in code_spans(text):
        if span.startswith(("svdllm ", "make ", "--")):
            yield shlex.split(span)


def problems_of_command(words: list[str]) -> list[str]:
    """What is wrong with the words after ``svdllm``."""
    command = words[0] if words else ""
    if command in OF_THE_PROGRAM:
        return []
    if command not in OPTIONS:
        return [f"no command {command!r}"]
    ours = words[1 : words.index("--")] if "--" in words else words[1:]  # what follows is another program's
    options = [word.partition("=")[0] for word in ours if re.match(r"--?[a-zA-Z]", word)]
    return [f"{command} has no option {option}" for option in options if option not in OPTIONS[command]]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page: Path) -> None:
    problems = []
    for words in command_lines(page.read_text(encoding="utf-8")):
        if words[:1] == ["svdllm"]:
            problems += problems_of_command(words[1:])
        elif words[:1] == ["make"]:
            targets = [word for word in words[1:] if "=" not in word]
            problems += [f"make has no target {target}" for target in targets if target not in make_targets()]
        elif words and words[0].startswith("--") and not any(words[0] in options for options in OPTIONS.values()):
            problems.append(f"no command has an option {words[0]}")
    assert not problems


def test_unknown_commands_and_options_are_found() -> None:
    page = "`svdllm mend OUT` and `--colour`\n\n```sh\nsvdllm plan MODEL \\\n  --ration 0.2  # a slip\nmake tea\n```\n"
    assert list(command_lines(page)) == [
        ["svdllm", "plan", "MODEL", "--ration", "0.2"],
        ["make", "tea"],
        ["svdllm", "mend", "OUT"],
        ["--colour"],
    ]
    assert problems_of_command(["plan", "MODEL", "--ration", "0.2"]) == ["plan has no option --ration"]
    assert problems_of_command(["mend", "OUT"]) == ["no command 'mend'"]
    assert problems_of_command(["compress", "MODEL", "-o", "OUT", "--ratio=0.2"]) == []
    assert "tea" not in make_targets()


def test_readme_is_short_and_begins_with_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = fenced(readme, "sh")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    assert len(readme.split()) <= 900


def test_the_page_of_commands_names_every_command() -> None:
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert [name for name in OPTIONS if f"`svdllm {name}`" not in page] == []


def test_every_page_is_on_the_site_and_in_the_index_once() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    on_site = [page for group in navigation for pages in group.values() for entry in pages for page in entry.values()]
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md"))
    outside = ["source/CHANGELOG.md", "source/CONTRIBUTING.md"]
    assert sorted(on_site) == sorted(pages + outside)

    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = [link for link in LINK.findall(index) if not re.match(r"[a-z]+:|\.\./README", link)]
    expected = [page.replace("source/", "../") for page in on_site if page != "index.md"]
    assert listed == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_of_tree(tree: str) -> Iterator[Path]:
    """The files and folders of a tree of names, indented by two, with a caption after two spaces."""
    above: list[Path] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        paths = [Path(*above[:depth][-1:], name) for name in names]
        above = [*above[:depth], paths[0]]
        yield from paths


def test_the_tree_of_the_code_exists_and_names_every_room() -> None:
    page = (ROOT / "docs/code.md").read_text(encoding="utf-8")
    (tree,) = fenced(page, "text")
    named = list(files_of_tree(tree))
    assert [path.as_posix() for path in named if not (ROOT / path).exists()] == []
    package = ROOT / "src/svdllm"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert {path.name for path in named if path.parent.name == "svdllm"} == rooms | {"__init__.py"}

    spans = [span for span in code_spans(page) if re.fullmatch(r"[a-z_]+(/[a-z_]+)+(\.py)?", span)]
    assert [span for span in spans if not (package / span).exists()] == []


def test_a_tree_is_read_line_by_line() -> None:
    tree = "src/\n  one/    a room\n    a.py, b.py  files\n  two.py\n"
    assert [path.as_posix() for path in files_of_tree(tree)] == [
        "src",
        "src/one",
        "src/one/a.py",
        "src/one/b.py",
        "src/two.py",
    ]


def python_sources() -> list[tuple[str, str]]:
    blocks = [
        (f"{page.name}, block {number}", block)
        for page in PAGES
        if page.name != "extending.md"  # which is about the inside, and runs in test_extending.py
        for number, block in enumerate(fenced(page.read_text(encoding="utf-8"), "python"))
    ]
    examples = [(path.name, path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("examples/*.py"))]
    return blocks + examples


@pytest.mark.parametrize("source", [pytest.param(text, id=name) for name, text in python_sources()])
def test_python_examples_use_public_names_only(source: str) -> None:
    tree = ast.parse(source)
    used, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "svdllm":
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "svdllm":
            modules.add(node.module)
            used.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names if alias.name.startswith("svdllm"))
    assert modules <= {"svdllm"}
    assert used <= set(svdllm.__all__)


def test_quoted_messages_are_those_of_the_source() -> None:
    """Of every message that the page of questions quotes, some words beside names and numbers stand in the source."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    texts = re.sub(r'"\s*\n\s*f?"', "", source) + "".join(map(os.strerror, (ENOSPC, EDQUOT, EFBIG)))
    page = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
    quotes = [quote for heading in re.findall(r"^### (.+)$", page, re.MULTILINE) for quote in QUOTE.findall(heading)]
    assert len(quotes) > 20
    assert [quote for quote in quotes if not any(piece in texts for piece in pieces_of(quote))] == []


def pieces_of(message: str) -> list[str]:
    """The pieces between what varies in a message: names with dots or several capitals, numbers, omissions."""
    pieces = re.split(r"\S*[0-9./_]\S*|\b[A-Z]\w*[A-Z]\w*|[,():]", message)
    return [piece.strip() for piece in pieces if len(piece.strip()) >= 6]


def test_readme_python_example_has_existing_settings() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    calls = [
        node
        for block in fenced(readme, "python")
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Recipe"
    ]
    assert calls
    for call in calls:
        svdllm.Recipe(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords})


def test_no_file_names_a_home_folder() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    needles = [f"/{folder}/".encode() for folder in ("home", "root", "Users")]
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    found = [
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]
    assert found == []
