"""The `s2t2` command. A user's mistake prints one line on stderr and exits with code 2.

Commands import what they need when they run, so that `s2t2 --help` answers at once.
"""

import contextlib
import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_prep.cli import OutDir, data_app, tokenizer_app
from s2t2_dist import artifacts
from s2t2_dist.errors import S2T2Error
from s2t2_dist.report.cli import compare, translation_app
from s2t2_dist.study.cli import study

USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
config_app = typer.Typer(no_args_is_help=True, help="Look up what a recipe may hold.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(translation_app, name="translation")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace the recipe's: stages.translate.max_steps=50",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"s2t2-dist {version('s2t2-dist')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
):
    """Move a language model to a new tokenizer by sparse Sinkhorn token translation."""


@app.command("train")
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see launch/recipes/.")],
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(help="auto (newest good checkpoint), never (new directory only), or a path."),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make every check of a start; write nothing.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
):
    """Run or resume a recipe: translate, finetune, evaluate.

    In one process: `s2t2 train launch/recipes/quickstart.yaml output_dir=runs/mine`

    On many devices: `launch/run_node.sh --gpus 8 launch/recipes/quickstart.yaml`, or
    `deepspeed --module s2t2_dist.train launch/recipes/quickstart.yaml`

    The same command resumes a stopped run. Exit codes: 0 done, 2 a mistake in the recipe or data,
    3 stopped by a signal with a checkpoint written, 4 ended because another rank was lost.
    """
    from s2t2_dist.run.output import survive_closed_output
    from s2t2_dist.run.stopping import Launchers

    survive_closed_output()
    launchers = Launchers.now()  # before the imports, which take seconds

    from s2t2_dist.config import load_recipe
    from s2t2_dist.training import start

    raise typer.Exit(start.run(load_recipe(recipe, overrides), resume, dry_run, launchers))


app.command("study")(study)


@app.command("track")
def track(
    run_dir: Annotated[Path, typer.Argument(help="A run's output_dir; no job may run in it.")],
    seconds: Annotated[
        float, typer.Option(min=1, max=1e6, help="Seconds to wait for the MLflow server.")
    ] = 60.0,
):
    """Upload the metrics that MLflow could not receive.

    Each arrives once. `MLFLOW_TRACKING_URI`, if set, wins over the recipe's `tracking.uri`.

    Example: `s2t2 track runs/quickstart`
    """
    from s2t2_dist.report.track import replay

    print(replay(run_dir, seconds))


@app.command("plan")
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe; see launch/recipes/.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the whole job.")],
    gpu_memory: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Memory of each GPU, in GiB.")
    ],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each node.")] = 8,
    config: Annotated[
        Path | None,
        typer.Option(help="Folder with the model's config.json; default: the recipe's."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Vocabulary of data that is not built yet.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens per row of data that is not built yet.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
):
    """Estimate memory, traffic and disk; pick a DeepSpeed config.

    By arithmetic from the model's config; nothing is measured and no weights are read.

    Example: `s2t2 plan launch/recipes/olmo-1b-uniref50.yaml --gpus 8 --gpu-memory 80`
    """
    import json

    from rich import print as show_rich

    from s2t2_dist.config import load_recipe
    from s2t2_dist.sizing.report import GIB, Hardware, show, size_recipe

    hardware = Hardware(gpus, gpus_per_node)
    made = size_recipe(
        load_recipe(recipe, overrides), hardware, gpu_memory * GIB, config, vocab_size, context
    )
    print(json.dumps(made.values(), indent=1)) if as_json else show_rich(show(made))


@config_app.command("schema")
def config_schema():
    """Print a recipe's JSON schema, for editors that check and complete.

    Example: `s2t2 config schema > recipe.schema.json`

    The first line of a recipe then tells an editor with yaml-language-server where it is:
    `# yaml-language-server: $schema=recipe.schema.json`
    """
    import json

    from s2t2_dist.config import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


class Dtype(StrEnum):
    """What weights and activations may be."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command("evaluate")
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    data_dir: Annotated[Path, typer.Argument(help="Data folder of `s2t2 data build`.")],
    split: Annotated[str, typer.Option(help="Rows to score: train or validation.")] = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the model; default: as stored.")] = None,
    marginal: Annotated[
        bool, typer.Option("--marginal", help="Also over all tokenizations of the text; slow.")
    ] = False,
    beam: Annotated[int, typer.Option(min=2, help="Of --marginal: paths kept at a byte.")] = 4,
):
    """Print loss, perplexity and bits per byte of a model folder.

    Scores every row of a split, in one process, on the GPU if there is one; `--marginal` also adds
    up all tokenizations of the text, which is fair between long tokens and single characters.

    Example: `s2t2 evaluate exports/protein data/protein --marginal`
    """
    from s2t2_dist.report.evaluate import evaluate_all, load, report

    lm, reader = load(model_dir, data_dir, split, dtype and dtype.value)
    if not marginal:
        print(report(evaluate_all(lm, reader, batch_size)))
        return
    from data_prep.tokenizer import load_tokenizer
    from s2t2_dist.data.shards import TOKENIZER_DIR
    from s2t2_dist.report.marginal import report_marginal, score_marginal

    known = load_tokenizer(data_dir / TOKENIZER_DIR)
    print(report_marginal(score_marginal(lm, reader, known, batch_size, beam)))


@app.command("export")
def export(
    run_dir: Annotated[Path, typer.Argument(help="A finished run's output_dir.")],
    out: OutDir,
    max_shard_size: Annotated[
        str, typer.Option(help="Size of the largest safetensors file.")
    ] = "5GB",
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Evaluate it on the whole validation split; compare with the run's number.",
        ),
    ] = True,
):
    """Write a finished run's model as a Hugging Face folder.

    The folder is verified and evaluated before it appears, on the GPU if there is one.

    Example: `s2t2 export runs/quickstart --out exports/protein`
    """
    from s2t2_dist.report.export import release

    # So that what it has written so far is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    release(run_dir, out, max_shard_size, evaluate)
    print(f"{out} written and verified{', not evaluated' * (not evaluate)}")


@app.command("verify")
def verify(model_dir: Annotated[Path, typer.Argument(help="Hugging Face folder.")]):
    """Check that a model folder fits its config and tokenizer.

    Prints every check; exit code 2 if one fails.

    Example: `s2t2 verify exports/protein`
    """
    from rich import print as show

    from s2t2_dist.report.verify import require_passed, table, verify_model

    checks = verify_model(model_dir)
    show(table(model_dir, checks))
    require_passed(model_dir, checks)


app.command("compare")(compare)


def main() -> None:
    """Entry point of the console script.

    Ends the process without the interpreter's shutdown: gloo's threads live that long, and one
    that then lets go of a tensor aborts the process (seen as exit code 134 once in ten).
    """
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run a command, such as ["data", "verify", "DIR"]; returns its exit code."""
    try:
        app(args=arguments)
    except SystemExit as end:  # how typer ends every command
        return end.code or 0
    except S2T2Error as error:
        problem = error
    except Exception as error:
        problem = _known_problem(error, f"running s2t2 {' '.join(arguments[:2])}")
        if problem is None:
            raise
    if not problem.collective or os.environ.get("RANK", "0") == "0":  # rank 0 speaks for all
        for line in problem.lines:
            print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _known_problem(error: Exception, doing: str) -> S2T2Error | None:
    """The one-line error for what is no bug of ours; None for any other exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return artifacts.disk_error(error, doing) or S2T2Error(f"{doing}: {error}")
    if type(error).__name__ == "SafetensorError":  # importing its class takes a while
        reason = " ".join(str(error).split())
        return S2T2Error(f"weights could not be read or written while {doing}: {reason}")
    return None


if __name__ == "__main__":
    main()
