"""`s2t2 study`, as the command line shows it."""

from pathlib import Path
from typing import Annotated

import typer


def study(
    study_file: Annotated[Path, typer.Argument(help="YAML study file; see launch/studies/.")],
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that share the runs and the CPU's cores.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what is missing; write nothing.")
    ] = False,
):
    """Run a recipe's variants over seeds and rates; table and figure.

    Makes the runs that are missing and resumes those that were stopped. Each is an ordinary run
    directory. Then writes table.md, table.csv, figure.png and study.json: mean and spread over
    seeds, with the best rate of each variant chosen on half of the validation documents and
    reported on the other half.

    Example: `s2t2 study launch/studies/demo.yaml --jobs 2`

    The same command goes on after any stop. Exit codes: 0 done, 2 a mistake in the study file or
    a run that failed, 3 stopped by a signal with checkpoints written.
    """
    from s2t2_dist.run.output import survive_closed_output
    from s2t2_dist.study.command import run_study

    survive_closed_output()
    raise typer.Exit(run_study(study_file, jobs, dry_run))
