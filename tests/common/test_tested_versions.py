"""The tested versions agree wherever they are named: the package, its bounds, the constraints and the Makefile."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import svdllm
from svdllm.common import tested_versions
from svdllm.models.low_rank import family_classes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def printed(script: str) -> list[str]:
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / script)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def import_again(monkeypatch: pytest.MonkeyPatch, transformers_version: str) -> list[str]:
    """What is warned of when svdllm is imported with this version of transformers."""
    monkeypatch.setattr(tested_versions.transformers, "__version__", transformers_version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(svdllm)
    return [str(warning.message) for warning in caught if "tested" in str(warning.message)]


@pytest.mark.parametrize("found", ["5.25.0", "5.100.2", "6.0.0.dev0"])
def test_a_newer_transformers_than_any_tested_is_warned_of_once(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested_versions, "NEWEST", "5.24")
    assert import_again(monkeypatch, found) == [
        f"transformers {found} is newer than any that this version of svdllm was tested with (5.16 to 5.24). "
        "If something fails, take a newer svdllm or: pip install 'transformers<5.25'"
    ]


@pytest.mark.parametrize("found", ["5.16.0", "5.23.0", "5.24.0", "5.24.3"])
def test_tested_versions_are_not_warned_of(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested_versions, "NEWEST", "5.24")
    assert import_again(monkeypatch, found) == []


def test_code_files_of_checkpoints_know_nothing_of_it() -> None:
    assert not any("tested_versions" in text for text in family_classes("llama").causal_lm.code_files().values())


def test_the_tested_range_is_that_of_bounds_and_constraints(project: dict[str, Any]) -> None:
    oldest, newest = Version(tested_versions.OLDEST), Version(tested_versions.NEWEST)
    assert f"transformers>={oldest}" in project["dependencies"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = [Version(found) for found in re.findall(r"^transformers==([\d.]+)", constraints, re.MULTILINE)]
    assert pinned
    assert all(oldest <= found for found in pinned)
    assert all(found.release[:2] <= newest.release for found in pinned)


def test_lower_bounds_are_those_of_every_requirement(project: dict[str, Any]) -> None:
    oldest: dict[str, Version] = {}
    extras = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, extras):
        for bound in requirement.specifier:
            assert bound.operator == ">="
            name, found = requirement.name, Version(bound.version)
            oldest[name] = min(found, oldest.get(name, found))
    lines = dict(line.split("==") for line in printed("lower_bounds.py"))
    assert {name: Version(found) for name, found in lines.items()} == oldest


def test_the_oldest_versions_are_tested_with_all_extras_that_can_be(project: dict[str, Any]) -> None:
    extras = Requirement(project["optional-dependencies"]["test"][0]).extras
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"^OLDEST_EXTRAS := (.*)$", makefile, re.MULTILINE)
    assert [set(line.split(",")) for line in found] == [extras - {"onnx", "openvino"}]


def test_installed_versions_are_printed() -> None:
    lines = printed("versions.py")
    assert lines == sorted(lines)
    assert {f"{name} {version(name)}" for name in ("torch", "transformers", "PyYAML", "rouge_score")} <= set(lines)
