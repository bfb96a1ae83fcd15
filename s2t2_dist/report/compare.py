"""`s2t2 compare`: the paper's table and figure over finished runs.

Bits per byte compare across tokenizers; perplexity per token does not (paper, section 3).
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from s2t2_dist import artifacts
from s2t2_dist.config import INITS, METHODS, Finetune, Pretrain, Stage, Translate
from s2t2_dist.errors import DataError
from s2t2_dist.lm.translation import Translation
from s2t2_dist.report.figure import draw
from s2t2_dist.report.runs import FinishedRun, read_runs, uniform_bits, unigram_bits
from s2t2_dist.report.translation import summarize
from s2t2_dist.run.tracking import attach

TABLE_JSON, TABLE_MD, FIGURE = "table.json", "table.md", "figure.png"
NOTES = (
    "Every line is evaluated on the whole validation split; a row's first token is not predicted.",
    "Unigram: byte frequencies of the train split, plus one for each of the 256 values.",
    "Steps: optimizer steps of the stage, and of the run up to its end; tokens seen likewise "
    "count from the run's start.",
    "P: non-zeros per source token, per target token, and as a share of all entries; H(P) in nats. "
    "If E and L have separate plans, means of the two.",
)


@dataclass(frozen=True)
class Row:
    """One line of the table; fields that do not apply are None.

    Attributes:
        new_tokenizer: whether the model uses the new domain's tokenizer.
        perplexity: per token.
        bytes_per_token: of the validation split.
        tokens_seen: training tokens since the start of the run.
        nonzeros_per_row, nonzeros_per_column, nonzero_share, entropy: of P (H(P) in nats); means
            of the two plans if E and L have separate ones.
    """

    label: str
    bits_per_byte: float
    run: str | None = None
    stage: str | None = None
    new_tokenizer: bool = False
    perplexity: float | None = None
    bytes_per_token: float | None = None
    stage_steps: int | None = None
    total_steps: int | None = None
    tokens_seen: int | None = None
    nonzeros_per_row: float | None = None
    nonzeros_per_column: float | None = None
    nonzero_share: float | None = None
    entropy: float | None = None


def compare(run_dirs: list[Path], out: Path) -> Group:
    """Write table.json, table.md and figure.png for runs over the same text; returns the table.

    These three files in `out` are replaced; other files are left alone.

    Raises:
        ArtifactError: a run is not done.
        DataError: the runs have different text, or one is given twice.
    """
    _require_different(run_dirs)
    runs = _with_names(read_runs(run_dirs))
    rows = make_rows(runs)
    best = best_new(rows)
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "runs": [str(path) for path in run_dirs],
        "rows": [asdict(row) for row in rows],
        "best_new_tokenizer": best and {"label": best.label, "run": best.run},
        "notes": NOTES,
    }
    artifacts.write_json(out / TABLE_JSON, values)
    artifacts.write_text(out / TABLE_MD, markdown(rows, best))
    guesses = dict(zip(("uniform", "unigram"), map(_bits, rows), strict=False))
    draw(out / FIGURE, _named(runs), guesses)
    files = [out / name for name in (TABLE_MD, TABLE_JSON, FIGURE)]
    all(attach(path, files) for path in run_dirs)  # up to the first failure, of which a line tells
    return terminal_tables(rows, best)


def _require_different(run_dirs: list[Path]) -> None:
    places = [path.resolve() for path in run_dirs]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise DataError(f"{run_dirs[number]} is given twice; give each run once")


def _with_names(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs, with so much of their path as a name that each has another."""
    parts = [run.path.resolve().parts for run in runs]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    names = ["/".join(path[-length:]) for path in parts]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def make_rows(runs: list[FinishedRun]) -> list[Row]:
    """The table's lines: two baselines without a model, then every stage of every run."""
    bits, alphabet = uniform_bits(runs[0].data)
    rows = [Row(f"Uniform over {alphabet}", bits), Row("Unigram", unigram_bits(runs[0].data))]
    for run in runs:
        for index, stage in enumerate(run.recipe.stages):
            if index == 0 and isinstance(stage, Finetune):
                rows.append(_row(run, index, 0))
            rows.append(_row(run, index, stage.max_steps))
    return rows


def _named(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Runs by the label of their last stage; the run's name is added to labels that repeat."""
    ends = [
        _label(run, len(run.recipe.stages) - 1, run.recipe.stages[-1].max_steps) for run in runs
    ]
    return {
        end if ends.count(end) == 1 else f"{end} ({run.name})": run
        for end, run in zip(ends, runs, strict=True)
    }


def best_new(rows: list[Row]) -> Row | None:
    """The line with the fewest bits per byte among those that use the new tokenizer."""
    return min((row for row in rows if row.new_tokenizer), key=_bits, default=None)


def _bits(row: Row) -> float:
    return row.bits_per_byte


def _row(run: FinishedRun, index: int, step: int) -> Row:
    stage = run.recipe.stages[index]
    evaluation = run.evaluations(index)[step]
    tokens = [s.train_batch_size * run.data["context"] for s in run.recipe.stages]
    before = sum(t * s.max_steps for t, s in zip(tokens, run.recipe.stages[:index], strict=False))
    translation = run.translation_of(stage)
    return Row(
        label=_label(run, index, step),
        bits_per_byte=evaluation["eval_bits_per_byte"],
        run=run.name,
        stage=stage.name,
        new_tokenizer=not (isinstance(stage, Pretrain) or _is_source(stage)),
        perplexity=evaluation["eval_perplexity"],
        bytes_per_token=run.bytes_per_token("validation"),
        stage_steps=step,
        total_steps=run.first_step(index) + step,
        tokens_seen=before + step * tokens[index],
        **(_plan_numbers(translation) if translation else {}),
    )


def _plan_numbers(translation: Translation) -> dict[str, float]:
    summaries = summarize(translation).values()
    keys = ("nonzeros_per_row", "nonzeros_per_column", "nonzero_share", "entropy")
    return {key: mean(getattr(summary, key) for summary in summaries) for key in keys}


def _is_source(stage: Stage) -> bool:
    return isinstance(stage, Finetune) and stage.init == "source"


def _label(run: FinishedRun, index: int, step: int) -> str:
    stage = run.recipe.stages[index]
    if isinstance(stage, Translate):
        return f"{_name(stage.method, stage.plans, stage.warm_start)}, translation only"
    if isinstance(stage, Pretrain):
        return "Pretrained from random weights"
    finetuned = " + CFT" if step else ", before CFT"
    if stage.init == "truncate":
        return f"New tokenizer, truncated{finetuned}"
    if stage.init in INITS:
        return f"New tokenizer, {INITS[stage.init]}{finetuned}"
    if stage.init == "source":
        cut = "characters" if run.data["characters"] else "BPE"
        return f"Source tokenizer ({cut}){finetuned}"
    if stage.translation is None:
        learned = [s for s in run.recipe.stages[:index] if isinstance(s, Translate)][-1]
        return f"{_name(learned.method, learned.plans, learned.warm_start)}{finetuned}"
    return f"{_method(run.translation_of(stage))}, transferred{finetuned}"


def _method(translation: Translation) -> str:
    stages = translation.info.get("recipe", {}).get("stages", [])
    learned = [s for s in stages if s["name"] == translation.info.get("stage")]
    plans = "separate" if len(translation.plans) > 1 else "shared"
    if not learned:
        return "Translation"
    return _name(learned[0]["method"], plans, learned[0].get("warm_start"))


def _name(method: str, plans: str, warm_start: str | None) -> str:
    begun = f" from {INITS[warm_start]}" if warm_start else ""
    return METHODS[method] + begun + (" (P for E, P for L)" if plans == "separate" else "")


COLUMNS = (
    ("bits/\nbyte", "bits_per_byte", "{:.3f}"),
    ("perplexity\nper token", "perplexity", "{:,.2f}"),
    ("bytes/\ntoken", "bytes_per_token", "{:.2f}"),
    ("stage\nsteps", "stage_steps", "{:,}"),
    ("total\nsteps", "total_steps", "{:,}"),
    ("tokens\nseen", "tokens_seen", "{:,}"),
    ("non-zeros\nper row of P", "nonzeros_per_row", "{:,.1f}"),
    ("non-zeros\nper column", "nonzeros_per_column", "{:,.1f}"),
    ("share of\nnon-zeros", "nonzero_share", "{:.2%}"),
    ("H(P),\nnats", "entropy", "{:.2f}"),
)
PLAN_COLUMNS = 6  # index of the first column that describes P


def _cells(row: Row, columns: tuple = COLUMNS) -> list[str]:
    values = ((form, getattr(row, key)) for _, key, form in columns)
    return ["" if value is None else form.format(value) for form, value in values]


def markdown(rows: list[Row], best: Row | None) -> str:
    """The table as GitHub Markdown, the best use of the new tokenizer in bold."""
    titles = (title.replace("\n", " ").replace("/ ", "/") for title, _, _ in COLUMNS)
    lines = ["| | run | " + " | ".join(titles) + " |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS))
    for row in rows:
        cells = [escaped(row.label), escaped(row.run or ""), *_cells(row)]
        if row is best:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Bold: the best use of the new tokenizer.", "", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text in a cell of a Markdown table."""
    for mark in ("\\", "|", "*", "`", "<"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def terminal_tables(rows: list[Row], best: Row | None) -> Group:
    """The table for a terminal of 80 columns: the results, then the plans."""
    results, plans = COLUMNS[:PLAN_COLUMNS], COLUMNS[PLAN_COLUMNS:]
    learned = [row for row in rows if row.entropy is not None]
    tables = [_terminal_table(rows, results, best)]
    tables[0].caption = "* best use of the new tokenizer"
    if learned:
        tables.append(_terminal_table(learned, plans, best))
    return Group(*tables)


def _terminal_table(rows: list[Row], columns: tuple, best: Row | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("")
    for title, _, _ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    labels = Counter(row.label for row in rows)
    for row in rows:
        shared = f" ({row.run})" if labels[row.label] > 1 else ""
        label = Text(f"{'* ' if row is best else ''}{row.label}{shared}")
        table.add_row(label, *_cells(row, columns), style="bold green" if row is best else "")
    return table
