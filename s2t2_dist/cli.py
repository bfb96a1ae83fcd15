"""The `s2t2` command. A user's mistake prints one line on stderr and exits with code 2.

Commands import what they need when they run, so that `s2t2 --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from s2t2_dist import artifacts
from s2t2_dist.errors import S2T2Error

USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Move a language model to a new tokenizer by sparse Sinkhorn token translation.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer on the new domain.")
data_app = typer.Typer(no_args_is_help=True, help="Turn FASTA or text into training rows.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

Inputs = Annotated[
    list[Path],
    typer.Argument(help="FASTA, .jsonl (field `text`) or .txt files, gzipped or not."),
]
OutDir = Annotated[Path, typer.Option("--out", help="Folder to make; never overwritten.")]


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: OutDir,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Tokens in all, special tokens included.")
    ] = 512,
    sample: Annotated[
        int, typer.Option(min=1, max=2**31 - 1, help="Characters to train on (90 bytes each).")
    ] = 20_000_000,
):
    """Train a BPE tokenizer: over amino acid letters for FASTA, byte-level for text.

    Trains on the documents whose ids hash lowest, so the sample does not depend on file order.

    Example: `s2t2 tokenizer train uniref50.fasta.gz --vocab-size 512 --out tokenizers/protein`
    """
    from data_prep.tokenizer import train_tokenizer

    _report(out, train_tokenizer(inputs, out, vocab_size, sample))


@data_app.command("build")
def data_build(
    inputs: Inputs,
    out: OutDir,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    context: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, by the hash of their ids.")
    ] = 0.01,
    characters: Annotated[
        bool, typer.Option("--characters", help="One token for every character.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Of the document order; not of the split.")
    ] = 0,
):
    """Tokenize documents into Arrow shards of fixed-length rows, split into train and validation.

    Example: `s2t2 data build uniref50.fasta.gz --tokenizer tokenizers/protein --out data/protein`
    """
    from data_prep.build import BuildOptions, build_shards

    options = BuildOptions(context, validation_fraction, characters, seed)
    _report(out, build_shards(inputs, tokenizer, out, options))


@data_app.command("verify")
def data_verify(
    directory: Annotated[Path, typer.Argument(help="What `s2t2 data build` made.")],
):
    """Check every file of a data folder against its manifest and print what it holds.

    Example: `s2t2 data verify data/protein`
    """
    from s2t2_dist.data import SPLITS, ShardReader

    for split in SPLITS:
        reader = ShardReader(directory, split, verify="full" if split == SPLITS[0] else "size")
        held = reader.metadata["splits"][split]
        print(
            f"{split}: {held['documents']:,} documents, {held['bytes']:,} bytes, "
            f"{held['tokens']:,} tokens in {held['rows']:,} rows of {reader.context}"
        )
    print(f"{directory} is complete and unaltered")


@app.command("train")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML, see launch/recipes/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="stages.translate.max_steps=50"),
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto: from the newest good checkpoint; never; or a checkpoint.")
    ] = "auto",
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
):
    """Run a recipe: translate, finetune, evaluate. A run that was stopped goes on.

    Alone: `s2t2 train launch/recipes/quickstart.yaml output_dir=runs/mine`

    On many devices: `deepspeed --module s2t2_dist.train launch/recipes/quickstart.yaml`

    Exit codes: 0 done, 2 a mistake in the recipe or data, 3 stopped by a signal with a checkpoint
    written.
    """
    from s2t2_dist import trainer
    from s2t2_dist.config import load_recipe

    raise typer.Exit(trainer.run(load_recipe(recipe, overrides), resume))


def _report(out: Path, made: bool) -> None:
    print(f"{out} written" if made else f"{out} is already complete")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script.

    Args:
        arguments: default: the command line.
    """
    try:
        app(args=arguments)
    except S2T2Error as error:
        _fail(error)
    except OSError as error:
        known = artifacts.disk_error(error, f"running s2t2 {' '.join(sys.argv[1:3])}")
        if known is None:
            raise
        _fail(known)


def _fail(error: S2T2Error) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
