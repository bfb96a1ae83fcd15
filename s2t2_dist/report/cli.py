"""`s2t2 translation` and `s2t2 compare`, as the command line shows them."""

from pathlib import Path
from typing import Annotated

import typer

translation_app = typer.Typer(no_args_is_help=True, help="Look into a learned translation.")


@translation_app.command("show")
def translation_show(
    path: Annotated[Path, typer.Argument(help="A run's translation/ folder.")],
    top: Annotated[int, typer.Option(min=1, help="Source tokens to print of each.")] = 5,
    source_tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer folder; default: the base model's, if it is there."),
    ] = None,
    target_tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder; default: the data's, if it is there.")
    ] = None,
):
    """Print a plan's statistics and its sharpest target tokens.

    Each target token comes with the source tokens that it is made of.

    Example: `s2t2 translation show runs/quickstart/translation`
    """
    from rich import print as show

    from s2t2_dist.report.translation import report

    show(report(path, top, source_tokenizer, target_tokenizer))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Finished runs over the same text.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the three files, which are replaced.")
    ],
):
    """Print a table of finished runs; write it with a figure.

    The files are table.md, table.json and figure.png.

    Example: `s2t2 compare runs/quickstart runs/quickstart-truncated --out runs/comparison`
    """
    from rich import print as show

    from s2t2_dist.report.compare import FIGURE, TABLE_MD
    from s2t2_dist.report.compare import compare as compare_runs

    show(compare_runs(run_dirs, out))
    print(f"{out / TABLE_MD} and {out / FIGURE} written")
