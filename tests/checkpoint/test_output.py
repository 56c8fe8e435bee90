"""Where results go: links, mount points, outputs that another run is writing to, and what a kill leaves of them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import svdllm
from runs import TEXT, digests, run, small_recipe, token_windows
from svdllm.checkpoint import output as workspace
from svdllm.checkpoint.output import LOCK, Output
from svdllm.common.errors import InputError
from svdllm.common.locks import locked
from svdllm.common.progress import Reporter
from svdllm.comparison import Grid, Measures, demo, run_grid, variants_of
from svdllm.export.dense import export_dense
from svdllm.export.padded_heads import export_padded
from svdllm.export.quantize import quantize
from svdllm.recovery import make_recovery, recover

# Its processes start with the library imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["svdllm", "runs"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """A folder with an elastic checkpoint and a text."""
    folder = tmp_path_factory.mktemp("place")
    run(dense, folder / "elastic", recipe=small_recipe(elastic=True))
    (folder / "text.txt").write_text(TEXT)
    return folder


def recovered(dense: Path, place: Path, out: Path, reporter: Reporter | None = None, **options: Any) -> None:
    settings = {"methods": ("distill",), "data": str(place / "text.txt"), "seqlen": 16, "batch": 4, "steps": 2}
    recover(place / "elastic", out, make_recovery(settings | options), reporter=reporter)


def grid_of(dense: Path, place: Path) -> Grid:
    calibration = {"calibration": str(place / "text.txt"), "samples": 8, "seqlen": 16, "seed": 1}
    return Grid(
        model=str(dense),
        variants=variants_of(["svd"], calibration, None, teacher=str(dense)),
        ratios=(0.3,),
        measures=Measures(texts=(calibration["calibration"],), seqlen=16, windows=2, prompts=(), new_tokens=0),
        title="A grid",
    )


# A command: the dense model, the folder with a checkpoint and a text, and the output.
Writer = Callable[[Path, Path, Path], object]
WRITERS: dict[str, Writer] = {
    "compress": lambda dense, place, out: run(dense, out),
    "several ratios": lambda dense, place, out: svdllm.compress_many(
        dense, small_recipe(ratio=(0.2, 0.4)), out, calibration=token_windows()
    ),
    "slice": lambda dense, place, out: svdllm.slice_checkpoint(place / "elastic", 0.5, out),
    "export": lambda dense, place, out: export_dense(place / "elastic", out),
    "padded": lambda dense, place, out: export_padded(place / "elastic", out, 3),
    "quantize": lambda dense, place, out: quantize(dense, out),
    "recover": recovered,
    "compare": lambda dense, place, out: run_grid(grid_of(dense, place), out),
}
SKIP = ("svdllm/report.json", "ratio-0.2/svdllm/report.json", "ratio-0.4/svdllm/report.json")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def results(folder: Path) -> dict[str, str]:
    """What was made: the name of every file, and its hash where it is the same each time."""
    quantized = "quantization_config" in read_config(folder)
    found = {name: "" if quantized or name.startswith("cells/") else hash for name, hash in digests(folder, ()).items()}
    return found | dict.fromkeys(found.keys() & {*SKIP}, "")


def read_config(folder: Path) -> str:
    file = folder / "config.json"
    return file.read_text() if file.is_file() else ""


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, str]]:
    """What each command makes in a place of no particular kind, by its name; filled when it is asked for."""
    return {}


def made_by(name: str, known: dict[str, dict[str, str]], dense: Path, place: Path) -> dict[str, str]:
    if name not in known:
        out = place / name.replace(" ", "-")
        WRITERS[name](dense, place, out)
        known[name] = results(out)
    return known[name]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(
    name: str, exists: bool, dense: Path, place: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """To an empty folder, or to where there is none yet."""
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    if exists:
        real.mkdir(parents=True)
    link.symlink_to(real)
    WRITERS[name](dense, place, link)
    assert link.is_symlink()
    assert results(real) == made_by(name, expected, dense, place)
    assert names(tmp_path) == ["disk", "link"]
    assert names(real.parent) == ["real"]


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is taken for the mount point of a fresh disk."""
    folder = tmp_path / "mounted"
    (folder / "lost+found").mkdir(parents=True)
    is_mount = workspace.is_mount
    monkeypatch.setattr("svdllm.checkpoint.output.is_mount", lambda path: path == folder or is_mount(path))
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_a_mount_point_is_written_inside(
    name: str, dense: Path, place: Path, expected: dict[str, dict[str, str]], mounted: Path
) -> None:
    before = mounted.stat().st_ino
    WRITERS[name](dense, place, mounted)
    assert mounted.stat().st_ino == before
    assert results(mounted) == made_by(name, expected, dense, place)
    assert names(mounted.parent) == ["mounted"]
    assert "svdllm.partial" not in names(mounted)


@pytest.fixture
def another_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["compress", "recover", "quantize"])
def test_another_disk_gets_the_result(name: str, dense: Path, place: Path, another_disk: Path) -> None:
    WRITERS[name](dense, place, another_disk)
    assert (another_disk / "config.json").is_file()
    assert os.path.ismount(another_disk)


def test_a_folder_of_the_same_disk_mounted_there_is_known(dense: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "a source", tmp_path / "a target"
    source.mkdir()
    target.mkdir()
    if subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        assert not os.path.ismount(target)
        run(dense, target)
        assert (source / "config.json").is_file()
    finally:
        subprocess.run(["umount", target], check=True)


def test_nothing_beside_a_folder_is_needed_where_nothing_can_be_made(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "others" / "mine"
    out.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != out.parent and access(path, mode))
    run(dense, out)
    assert (out / "config.json").is_file()
    with pytest.raises(InputError, match=r"others/new cannot be made: .*others is not writable"):
        run(dense, out.with_name("new"))


def test_an_output_below_a_file_is_refused_at_once(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/out cannot be made: .*file is a file"):
        run(dense, tmp_path / "file" / "out")


def test_a_link_to_itself_is_refused_at_once(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(InputError, match="out is a link that leads nowhere"):
        run(dense, tmp_path / "out")


@pytest.mark.parametrize("kind", ["link", "mounted"])
def test_room_is_looked_for_on_the_disk_that_gets_the_bytes(
    kind: str, dense: Path, place: Path, mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    out.symlink_to(real)
    asked, usage = [], shutil.disk_usage(tmp_path)

    def disk_usage(path: Path) -> Any:
        asked.append(Path(path))
        return usage._replace(free=10_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    for name in ("compress", "slice", "export", "padded", "quantize", "recover"):
        with pytest.raises(svdllm.ResourceError, match=r"(link|mounted) has 0\.00 GB free, the .* needs? \d"):
            WRITERS[name](dense, place, out if kind == "link" else mounted)
    folder = real.parent if kind == "link" else mounted
    assert all(path in (folder, folder / "svdllm.writing") for path in asked)
    assert len(asked) == 6
    assert names(real) == []
    assert names(mounted) == ["lost+found"]


class Stopping(Reporter):
    """Kills the process when the first block is done."""

    def block_done(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_run(dense: Path, out: Path) -> None:
    run(dense, out, reporter=Stopping())


def test_a_killed_run_in_another_disk_goes_on(dense: Path, another_disk: Path, tmp_path: Path) -> None:
    process = FORKS.Process(target=killed_run, args=(dense, another_disk))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = another_disk / "svdllm.partial" / "analysis" / "block-0000.safetensors"
    assert done.is_file()
    assert (another_disk / LOCK).is_file()
    notes: list[str] = []
    reporter = Reporter()
    reporter.note = notes.append  # type: ignore[method-assign]
    run(dense, another_disk, reporter=reporter)
    assert notes == ["Continuing an earlier run: 1 of 2 blocks are done."]
    run(dense, tmp_path / "straight")
    assert digests(another_disk) == digests(tmp_path / "straight")


@pytest.mark.parametrize("name", ["compress", "several ratios", "recover"])
def test_killed_while_the_result_moves_up(
    name: str,
    dense: Path,
    place: Path,
    expected: dict[str, dict[str, str]],
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Config and report are the last to move, and the next run moves what is left."""
    replace, moved = Path.replace, []

    def stop_at_last(path: Path, target: Path) -> Path:
        if Path(target).parent == mounted:
            moved.append(path.name)
            if len(list(path.parent.iterdir())) == 1:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](dense, place, mounted)
    assert moved[-2:] == (["ratio-0.2", "ratio-0.4"] if name == "several ratios" else ["config.json", "svdllm"])
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(InputError, match="mounted exists and is a finished checkpoint; nothing is overwritten"):
        WRITERS[name](dense, place, mounted)
    assert results(mounted) == made_by(name, expected, dense, place)
    assert "svdllm.partial" not in names(mounted)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["new", "mounted"])
def test_an_output_that_another_run_writes_to_is_left_alone(
    name: str, kind: str, dense: Path, place: Path, mounted: Path, tmp_path: Path
) -> None:
    out = mounted if kind == "mounted" else tmp_path / "above" / "out"
    file = out / LOCK if name == "compare" or kind == "mounted" else out.with_name("out.lock")
    with locked(file, out):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            InputError, match=rf"Another run \(process {os.getpid()} on .*\) is writing to .*{out.name}\."
        ):
            WRITERS[name](dense, place, out)
        assert sorted(tmp_path.rglob("*")) == before


class Meanwhile(Reporter):
    """Does something else at the beginning of a stage."""

    def __init__(self, stage: str, action: Callable[[], object]):
        super().__init__()
        self.stage_name, self.action, self.told = stage, action, ""

    def start_stage(self, name: str, steps: int) -> None:
        if name == self.stage_name:
            with pytest.raises(InputError) as caught:
                self.action()
            self.told = str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.5}])
@pytest.mark.parametrize("stage", ["plan", "tokenise", "analyze", "write"])
def test_a_second_run_does_not_disturb_the_first(
    settings: dict[str, Any], stage: str, dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    reporter = Meanwhile(stage, lambda: run(dense, out, recipe=small_recipe(**settings), resume=False))
    run(dense, out, reporter=reporter)
    assert "is writing to" in reporter.told
    run(dense, tmp_path / "straight")
    assert digests(out) == digests(tmp_path / "straight")
    assert names(tmp_path) == ["out", "straight"]


def test_a_second_recovery_does_not_disturb_the_first(
    dense: Path, place: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    reporter = Meanwhile("distill", lambda: recovered(dense, place, out, lr=1e-3))
    recovered(dense, place, out, reporter)
    assert "is writing to" in reporter.told
    assert results(out) == made_by("recover", expected, dense, place)
    assert names(tmp_path) == ["out"]


def test_of_several_processes_only_the_first_takes_the_output(
    dense: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others are told comes from the checks that follow."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Output.at(tmp_path / "out").taken(), pytest.raises(InputError, match="no-such-text"):
        recovered(dense, place, tmp_path / "out", data="no-such-text.txt")


def test_a_shared_analysis_is_written_by_one_run_and_read_by_many(dense: Path, tmp_path: Path) -> None:
    shared = tmp_path / "analysis"

    def other(name: str, **settings: Any) -> svdllm.CompressionResult:
        return run(dense, tmp_path / name, recipe=small_recipe(**settings), analysis_dir=shared)

    reporter = Meanwhile("analyze", lambda: other("second", ratio=0.5))
    run(dense, tmp_path / "first", analysis_dir=shared, reporter=reporter)
    assert f"is writing to {shared}" in reporter.told
    assert not (tmp_path / "second").exists()
    assert not (tmp_path / "second.partial").exists()
    with locked(tmp_path / "out.lock", tmp_path / "out"):  # another output is none of its business
        assert "analyze" not in other("third", ratio=0.5).seconds
    assert LOCK not in names(shared)


def test_a_second_comparison_does_not_disturb_the_first(dense: Path, place: Path, tmp_path: Path) -> None:
    grid, told = grid_of(dense, place), []

    def on_cell(_: object) -> None:
        with pytest.raises(InputError) as caught:
            run_grid(grid, tmp_path / "report")
        told.append(str(caught.value))

    records = run_grid(grid, tmp_path / "report", on_cell=on_cell)
    assert [record["status"] for record in records] == ["done", "done"]
    assert len(told) == 2
    assert all(f"is writing to {tmp_path / 'report'}" in text for text in told)
    assert not (tmp_path / "report" / LOCK).exists()
    assert len(run_grid(grid, tmp_path / "report")) == 2


@pytest.mark.parametrize("kind", ["new", "link", "mounted", "earlier"])
def test_a_demo_is_made_anew_in_any_folder(
    kind: str, mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdllm.comparison.demo.smollm2_file", lambda: tmp_path / "model.gguf")
    told = []

    def compared(output: Path, *_: object) -> str:
        told.append(names(output))
        with pytest.raises(InputError, match="is writing to"):
            demo.run_demo(output, ratio=0.2, samples=1, reporter=Reporter())
        (output / "svd").mkdir()
        return "made"

    monkeypatch.setattr("svdllm.comparison.demo._compared", compared)
    out = mounted if kind == "mounted" else tmp_path / "out"
    if kind == "link":
        (tmp_path / "real").mkdir()
        out.symlink_to(tmp_path / "real")
    for _ in range(2 if kind == "earlier" else 1):
        assert demo.run_demo(out, ratio=0.2, samples=1, reporter=Reporter()) == "made"
    ours = [demo.MARKER, LOCK] + (["lost+found"] if kind == "mounted" else [])
    assert told == [sorted(ours)] * len(told)
    assert not (out / LOCK).exists()


def test_a_demo_removes_nothing_that_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdllm.comparison.demo.smollm2_file", lambda: tmp_path / "model.gguf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="out exists and is not a demo's; nothing is overwritten"):
        demo.run_demo(tmp_path / "out", ratio=0.2, samples=1, reporter=Reporter())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
