"""What the commands of `cli` share: options, and how they start and end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

# The exit code of a shell for what SIGINT has ended.
INTERRUPTED = 130

Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="FASTA, .jsonl, .txt or Parquet files, plain or compressed; folders; - for stdin."
    ),
]
OutDir = Annotated[Path, typer.Option("--out", help="Folder to make; never overwritten.")]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Refuse bad letters and empty documents; otherwise they are skipped and counted.",
    ),
]
TextField = Annotated[
    str, typer.Option("--field", help="JSON field or Parquet column that holds the text.")
]
IdField = Annotated[
    str,
    typer.Option(
        "--id-field", help="JSON field that holds the id; '' takes the hash of the text instead."
    ),
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out and count records that would be an error."),
]
KindOption = Annotated[
    Literal["bpe", "sentencepiece"],
    typer.Option("--kind", help="Library that trains: tokenizers (BPE) or SentencePiece."),
]
AlgorithmOption = Annotated[
    Literal["bpe", "unigram"],
    typer.Option("--algorithm", help="Model that it trains; unigram by SentencePiece only."),
]
ValidationFraction = Annotated[
    float, typer.Option(help="Share of documents held out, chosen by the hash of their ids.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes of this rank; default: its cores.")
]
Rank = Annotated[
    int, typer.Option(envvar="RANK", min=0, help="Index of this rank, which does one share.")
]
Ranks = Annotated[
    int, typer.Option(envvar="WORLD_SIZE", min=1, help="Number of ranks that share the work.")
]


def require_rank(context: typer.Context) -> None:
    """Raise an error if the environment says how many ranks there are, but not which this is."""
    from s2t2_dist.errors import DataError

    named = {name: context.get_parameter_source(name).name for name in ("rank", "ranks")}
    if named == {"rank": "DEFAULT", "ranks": "ENVIRONMENT"} and context.params["ranks"] > 1:
        raise DataError(
            f"WORLD_SIZE={context.params['ranks']} is set and RANK is not; give --ranks 1 to build "
            "alone, or --rank with the number of this rank"
        )


@contextmanager
def stoppable(hint: str) -> Iterator[None]:
    """End with one line and the shell's exit code if the user presses Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C; {hint}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def own_cores() -> int:
    """Cores that this process may use, shared with the other ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # What DeepSpeed's launcher and torchrun say.
    here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, (cores or 1) // max(1, int(here) if here.isdecimal() else 1))


def report(out: Path, made: bool) -> None:
    """Say what was made, and on stderr what of the input was changed or left out."""
    from data_prep.totals import print_note
    from s2t2_dist import artifacts

    print(f"{out} written" if made else f"{out} is already complete")
    print_note(artifacts.read_manifest(out))
