"""The commands `s2t2 tokenizer` and `s2t2 data`.

Commands import what they need when they run, so that `s2t2 --help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.cli_options import (
    AlgorithmOption,
    IdField,
    Inputs,
    KindOption,
    OutDir,
    Rank,
    Ranks,
    SkipBad,
    Strict,
    TextField,
    ValidationFraction,
    Workers,
    own_cores,
    report,
    require_rank,
    stoppable,
)

__all__ = ["OutDir", "data_app", "tokenizer_app"]

tokenizer_app = typer.Typer(
    no_args_is_help=True, help="Train and compare tokenizers of the new domain."
)
data_app = typer.Typer(no_args_is_help=True, help="Turn FASTA or text into training rows.")


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: OutDir,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Tokens in all, special tokens included.")
    ] = 512,
    sample: Annotated[
        int,
        typer.Option(
            min=1, max=2**31 - 1, help="Characters to train on; each takes 90 bytes of memory."
        ),
    ] = 20_000_000,
    kind: KindOption = "bpe",
    algorithm: AlgorithmOption = "bpe",
    strict: Strict = False,
    field: TextField = "text",
    id_field: IdField = "id",
    skip_bad: SkipBad = False,
):
    """Train a tokenizer: amino acid letters for FASTA, bytes for text.

    Trains on the documents whose ids hash lowest, so the sample does not depend on file order.

    Example: `s2t2 tokenizer train uniref50.fasta.gz --vocab-size 512 --out tokenizers/protein`
    """
    from data_prep.inputs import gathered
    from data_prep.readers import ReadOptions
    from data_prep.tokenizer import train_tokenizer

    read = ReadOptions(strict, field, id_field, skip_bad)
    with stoppable("nothing is left of it"), gathered(inputs) as files:
        made = train_tokenizer(files, out, vocab_size, sample, read, kind, algorithm)
    report(out, made)


@tokenizer_app.command("stats")
def tokenizer_stats(
    tokenizer: Annotated[Path, typer.Argument(help="Folder with tokenizer.json.")],
    inputs: Inputs,
    sample: Annotated[int, typer.Option(min=1, help="Characters to encode.")] = 5_000_000,
    top: Annotated[int, typer.Option(min=1, help="Tokens to list of each kind.")] = 10,
    field: TextField = "text",
    id_field: IdField = "id",
    skip_bad: SkipBad = False,
):
    """Print how a tokenizer cuts a corpus.

    Compression, unused tokens, and the most used and longest ones.

    Example: `s2t2 tokenizer stats tokenizers/protein uniref50.fasta.gz`
    """
    from data_prep.inputs import gathered
    from data_prep.readers import ReadOptions
    from data_prep.statistics import statistics_of

    with gathered(inputs) as files:
        read = ReadOptions(False, field, id_field, skip_bad)
        found = statistics_of(tokenizer, files, sample, read)
    tokens = int(found.counts_V.sum())
    print(f"{found.characters:,} characters, {tokens:,} tokens")
    print(f"{found.characters_per_token:.3f} characters per token")
    print(f"{len(found.unused)} tokens are not used: {_spelled(found, found.unused[:top])}")
    print(f"most used: {_spelled(found, found.most_used[:top])}")
    print(f"longest: {_spelled(found, found.longest[:top])}")


@tokenizer_app.command("sweep")
def tokenizer_sweep(
    inputs: Inputs,
    sizes: Annotated[
        str,
        typer.Option(
            help="Vocabulary sizes, separated by commas.",
            show_default="powers of 2 that hold the alphabet, to 8192",
        ),
    ] = "",
    kind: KindOption = "bpe",
    algorithm: AlgorithmOption = "bpe",
    sample: Annotated[int, typer.Option(min=1, help="Characters to use.")] = 2_000_000,
    field: TextField = "text",
    id_field: IdField = "id",
    skip_bad: SkipBad = False,
):
    """Print compression against vocabulary size.

    Each size is trained on four fifths of a sample of the documents and measured on the rest.

    Example: `s2t2 tokenizer sweep uniref50.fasta.gz --sizes 128,512,2048`
    """
    from data_prep.inputs import gathered
    from data_prep.readers import ReadOptions
    from data_prep.statistics import TokenStatistics, sweep

    try:
        numbers = [int(size) for size in sizes.split(",") if size]
    except ValueError:
        raise typer.BadParameter(f"{sizes!r} is not a list of numbers like 128,512") from None
    read = ReadOptions(False, field, id_field, skip_bad)
    heads = [f"{'size':>7} {'characters/token':>17} {'not used':>9} {'longest':>8}"]

    def show(size: int, found: TokenStatistics) -> None:
        while heads:
            print(heads.pop())
        longest = len(found.texts[found.longest[0]])
        shown = f"{found.characters_per_token:>17.3f} {len(found.unused):>9} {longest:>8}"
        print(f"{size:>7} {shown}", flush=True)

    with gathered(inputs) as files:
        sweep(files, numbers, kind, algorithm, sample, read, show)


@data_app.command("build")
def data_build(
    context_of: typer.Context,
    inputs: Inputs,
    out: OutDir,
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    context: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    validation_fraction: ValidationFraction = 0.01,
    characters: Annotated[
        bool, typer.Option("--characters", help="One token for every character.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the order; the split ignores it.")
    ] = 0,
    packing: Annotated[
        Literal["concatenate", "best-fit"],
        typer.Option(help="Documents end to end, or none cut that fits into a row."),
    ] = "concatenate",
    drop_ids: Annotated[
        Path | None,
        typer.Option(help="File whose lines begin with ids to leave out, such as hits.m8."),
    ] = None,
    strict: Strict = False,
    field: TextField = "text",
    id_field: IdField = "id",
    skip_bad: SkipBad = False,
    workers: Workers = None,
    rank: Rank = 0,
    ranks: Ranks = 1,
    only: Annotated[
        Literal["encode", "pack", "seal"] | None,
        typer.Option(help="One step to do, for ranks that run at different times."),
    ] = None,
):
    """Tokenize documents into Arrow shards of fixed-length rows.

    Documents are split into train and validation. The same command resumes a build that was
    killed. Many machines: see docs/data.md.

    Example: `s2t2 data build uniref50.fasta.gz --tokenizer tokenizers/protein --out data/protein`
    """
    from data_prep.build import BuildOptions, Jobs, build_shards
    from data_prep.inputs import gathered
    from data_prep.readers import ReadOptions

    require_rank(context_of)
    read = ReadOptions(strict, field, id_field, skip_bad)
    jobs = Jobs(workers or own_cores(), rank, ranks, only)
    goes_on = "the same command goes on where it stopped"
    with (
        stoppable(goes_on),
        gathered(inputs, ranks) as files,
        gathered([drop_ids] * bool(drop_ids), ranks, walk=False) as drop,
    ):
        options = BuildOptions(
            context, validation_fraction, characters, seed, packing, *(drop or [None]), read
        )
        made = build_shards(files, tokenizer, out, options, jobs)
    if only in (None, "seal") and rank == 0:
        report(out, made)


@data_app.command("ids")
def data_ids(
    inputs: Inputs,
    split: Annotated[str, typer.Option(help="Part to list: train or validation.")],
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, as for `data build`.")
    ] = 0.01,
    field: TextField = "text",
    id_field: IdField = "id",
    skip_bad: SkipBad = False,
):
    """Print the ids of a split, one per line.

    Needs no build, so that a homology filter can come first.

    Example: `s2t2 data ids uniref50.fasta.gz --split validation > validation.ids`
    """
    from data_prep.inputs import gathered
    from data_prep.listing import split_ids
    from data_prep.readers import ReadOptions
    from s2t2_dist.data.shards import SPLITS

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is none of {', '.join(SPLITS)}")
    read = ReadOptions(False, field, id_field, skip_bad)
    with gathered(inputs) as files:
        for identifier in split_ids(files, split, validation_fraction, read):
            print(identifier)


@data_app.command("check-release")
def data_check_release(
    directory: Annotated[Path, typer.Argument(help="A UniRef download with RELEASE.metalink.")],
):
    """Check a UniRef download by its release's size and md5.

    Leaves release.json there; `data build` then names the release in the manifest.

    Example: `s2t2 data check-release downloads/uniref50`
    """
    from data_prep.release import check_release

    record = check_release(directory)
    for name in record["files"]:
        print(f"{name} is of release {record['version']}")


@data_app.command("verify")
def data_verify(
    directory: Annotated[Path, typer.Argument(help="Data folder of `s2t2 data build`.")],
):
    """Check a data folder against its manifest.

    Prints what each split holds.

    Example: `s2t2 data verify data/protein`
    """
    from data_prep.progress import waiting
    from s2t2_dist.data.shards import SPLITS, ShardReader

    with waiting(f"Reading every file of {directory}"):
        ShardReader(directory, SPLITS[0], verify="full")
    for split in SPLITS:
        reader = ShardReader(directory, split)
        held = reader.metadata["splits"][split]
        print(
            f"{split}: {held['documents']:,} documents, {held['bytes']:,} bytes, "
            f"{held['tokens']:,} tokens in {held['rows']:,} rows of {reader.context}"
        )
    print(f"{directory} is complete and unaltered")


def _spelled(found, tokens: list[int]) -> str:
    """Tokens with their share of all, such as "LL 1.20%"."""
    total = found.counts_V.sum()
    return ", ".join(
        f"{found.texts[i].decode('utf-8', 'replace')!r} {found.counts_V[i] / total:.2%}"
        for i in tokens
    )
