"""`s2t2 study`: check, make what is missing, then write the results."""

import shlex
from collections import Counter, deque
from pathlib import Path

import torch
from rich import box
from rich import print as show
from rich.table import Table

from s2t2_dist import artifacts, comm
from s2t2_dist.errors import ConfigError, DataError
from s2t2_dist.report.runs import read_run, text_of
from s2t2_dist.study.config import RUNS, Study, StudyRun, load_study
from s2t2_dist.study.figure import draw
from s2t2_dist.study.measure import made_by, read_record
from s2t2_dist.study.progress import StudyProgress
from s2t2_dist.study.results import (
    FIGURE,
    TABLE_MD,
    Line,
    best,
    cells_of,
    make_lines,
    study_values,
    write_results,
)
from s2t2_dist.study.schedule import MEASURE, NEW, RESUME, Schedule, standing
from s2t2_dist.study.work import DONE

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED = 0, 2, 3


def run_study(path: Path, jobs: int, dry_run: bool) -> int:
    """Make what a study lacks, and its results; returns the exit code.

    0: every run is done. 2: some failed, and the table says which. 3: stopped by a signal, with
    checkpoints written; the same command goes on.

    Raises:
        S2T2Error: a mistake in the study file, found before anything is started.
    """
    if comm.is_launched():
        raise ConfigError(
            "a study starts its own processes of one rank each, but a launcher started this one "
            "(RANK is set); give `s2t2 study` without deepspeed, torchrun or srun, with --jobs"
        )
    study = load_study(path)
    _require_same_text(study)
    standings = {run.name: standing(study, run) for run in study.runs}
    todo = [run for run in study.runs if standings[run.name] != DONE]
    _tell(study, standings, dry_run)
    if dry_run:
        print("every recipe was read; nothing was written")
        return EXIT_DONE
    failed: dict[str, str] = {}
    if todo:
        with StudyProgress(study.runs, todo) as progress:
            schedule = Schedule(study, deque(todo), jobs, progress.told, progress.shown)
            if not schedule.run():
                print("stopped, with checkpoints written; the same command goes on")
                return EXIT_STOPPED
        failed = schedule.failed
    command = shlex.join(["s2t2", "study", str(path), "--jobs", str(jobs)])
    lines = _write(study, failed, command)
    show(terminal_table(lines))
    print(f"{study.output_dir / TABLE_MD} and {study.output_dir / FIGURE} written")
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
    return EXIT_FAILED if failed else EXIT_DONE


def _require_same_text(study: Study) -> None:
    """Every variant's data are there and hold the same text.

    Raises:
        ArtifactError: a data folder is missing or incomplete.
        DataError: two hold different text.
    """
    texts: dict[Path, dict] = {}
    for run in study.runs:
        folder = run.recipe.data.path
        if folder not in texts:
            texts[folder] = text_of(artifacts.read_manifest(folder))
    (first, text), *others = texts.items()
    for folder, other in others:
        if other != text:
            raise DataError(
                f"{folder} and {first} hold different text in train or validation; build the data "
                "of all variants from the same files and fraction"
            )


def _tell(study: Study, standings: dict[str, str], dry_run: bool) -> None:
    """Print what is there; in a dry run every run that is not done."""
    counts = Counter(standings.values())
    states = [f"{counts[s]} {s}" for s in (DONE, MEASURE, RESUME, NEW) if counts[s]]
    print(f"{study.output_dir}: {len(study.runs)} runs: {', '.join(states)}", flush=True)
    if not dry_run:
        return
    for run in study.runs:
        if standings[run.name] != DONE:
            print(f"{standings[run.name]:<10} {run.name} ({_steps(run)} steps)")
    todo = sum(run.steps for run in study.runs if standings[run.name] in (NEW, RESUME))
    print(f"{_rates(study)} for each of {len(study.file.variants)} variants")
    print(f"{todo:,} optimizer steps of {sum(run.steps for run in study.runs):,} are to do")


def _rates(study: Study) -> str:
    """How many rates are tried, and whether that is fair."""
    counts = {name: len(study.rates(name)) for name in study.file.variants}
    found = sorted(set(counts.values()))
    fair = "" if len(found) == 1 else ", which favours those with more,"
    return f"{' or '.join(map(str, found))} rates{fair}"


def _steps(run: StudyRun) -> str:
    return " + ".join(str(stage.max_steps) for stage in run.recipe.stages)


def _write(study: Study, failed: dict[str, str], command: str) -> list[Line]:
    found = {run.name: read_record(study.output_dir, run) for run in study.runs}
    records = {name: record for name, record in found.items() if record}
    lines = make_lines(study, records, failed)
    draw(study.output_dir / FIGURE, {line.label: _finished(study, line) for line in lines})
    values = study_values(study, lines, records, failed, command)
    write_results(study, lines, {**values, "made_by": made_by(torch.device("cpu"))})
    return lines


def _finished(study: Study, line: Line) -> list:
    """The runs of a line at its chosen rate, one for each seed."""
    if line.chosen is None:
        return []
    runs = [r for r in study.runs if r.variant == line.name and r.rate == line.chosen.rate]
    return [read_run(study.output_dir / RUNS / run.name) for run in runs]


def terminal_table(lines: list[Line]) -> Table:
    """The results for a terminal of 80 columns."""
    winner = best(lines)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="* lowest mean")
    table.caption_justify = "left"
    table.add_column("")
    for title in ("rate", "bits/byte", "n", "steps", "minutes", "failed"):
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        cells = cells_of(line)
        shown = [cells[i] for i in (0, 1, 3, 5, 9, 11)]
        style = "bold green" if line is winner else ""
        table.add_row(f"{'* ' * (line is winner)}{line.label}", *shown, style=style)
    return table
