"""The results of a study: `table.md`, `table.csv` and, last of all, `study.json`.

`study.json` holds every number, and the sha256 of the other files: it is their seal.
"""

import csv
import io
from dataclasses import asdict, dataclass
from statistics import mean

from s2t2_dist import artifacts
from s2t2_dist.errors import DataError
from s2t2_dist.report.compare import escaped
from s2t2_dist.run.directory import CONFIG
from s2t2_dist.study.config import RUNS, Study, rate_text
from s2t2_dist.study.halves import RULE
from s2t2_dist.study.statistics import Cell, Spread, choose

TABLE_MD, TABLE_CSV, FIGURE, STUDY_JSON = "table.md", "table.csv", "figure.png", "study.json"
FORMAT = 1
NOTES = (
    "Bits per byte are those of the `report` half of the validation documents, at the rate whose "
    "mean over seeds is lowest on the `select` half: " + RULE + ". No rate is chosen by what is "
    "reported. A row's first token is not predicted, and its bytes do not count.",
    "±: standard deviation over the seeds (n - 1). A rate counts if the run of every seed is "
    "finished.",
    "Steps, tokens, text and operations are of one run and all its stages, means over seeds. They "
    "are for three comparisons: equal steps, equal bytes of text, equal operations; which of them "
    "holds between two lines is read off here. Text that is read twice counts twice.",
    "Operations: forward and backward of the model (6 per weight and token and the attention's; "
    "less where weights are frozen), and the products of P with E and L; without the solver's "
    "comparisons and without evaluations.",
    "Minutes: in optimizer steps, as the machine was; all rates and seeds: of every finished run "
    "of the line, which is what the choice of its rate cost.",
)


@dataclass(frozen=True)
class Line:
    """A variant in the table.

    Attributes:
        cells: its rates, in the order of the study file.
        costs: of each cell, `cost.Cost` as a mapping, by seed.
    """

    name: str
    label: str
    cells: list[Cell]
    costs: list[dict[int, dict]]

    @property
    def chosen(self) -> Cell | None:
        return choose(self.cells)

    @property
    def failed(self) -> int:
        """Runs that failed."""
        return sum(len(cell.failed) for cell in self.cells)

    @property
    def tried_seconds(self) -> float:
        """Of every finished run."""
        return sum(cost["seconds"] for costs in self.costs for cost in costs.values())

    def cost(self, cell: Cell) -> dict[str, float]:
        """Mean over the seeds of a cell."""
        found = list(self.costs[self.cells.index(cell)].values())
        return {key: mean(cost[key] for cost in found) for key in found[0]} if found else {}


def make_lines(study: Study, records: dict[str, dict], failed: dict[str, str]) -> list[Line]:
    """The table's lines.

    Args:
        records: of `measure`, by run.
        failed: what is wrong, by run.

    Raises:
        DataError: two runs were validated on different documents.
    """
    _require_same_documents(records)
    lines = []
    for name in study.file.variants:
        cells, costs = [], []
        for rate in study.rates(name):
            runs = [run for run in study.runs if run.variant == name and run.rate == rate]
            found = {run.seed: records[run.name] for run in runs if run.name in records}
            cells.append(
                Cell(
                    rate,
                    tuple(run.seed for run in runs),
                    {seed: r["halves"]["select"]["bits_per_byte"] for seed, r in found.items()},
                    {seed: r["halves"]["report"]["bits_per_byte"] for seed, r in found.items()},
                    {seed: r["bits_per_byte"] for seed, r in found.items()},
                    tuple(run.seed for run in runs if run.name in failed),
                )
            )
            costs.append({seed: record["cost"] for seed, record in found.items()})
        lines.append(Line(name, study.label(name), cells, costs))
    return lines


def _require_same_documents(records: dict[str, dict]) -> None:
    first: dict[str, str] = {}
    for name, record in records.items():
        first.setdefault(record["documents_sha256"], name)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise DataError(
            f"{one} and {other} were validated on different documents; build the data of all "
            "variants from the same files and fraction"
        )


def best(lines: list[Line]) -> Line | None:
    """The line with the lowest mean on the half `report`."""
    complete = [line for line in lines if line.chosen]
    return min(complete, key=lambda line: mean(line.chosen.report.values()), default=None)


COLUMNS = (
    "rate",
    "bits per byte",
    "min to max",
    "n",
    "all documents",
    "steps",
    "tokens",
    "text, MB",
    "operations",
    "minutes",
    "all rates and seeds",
    "failed runs",
)


def cells_of(line: Line) -> list[str]:
    """A line of the table as text."""
    chosen, failed = line.chosen, str(line.failed or "")
    if chosen is None:
        state = "failed" if line.failed else "not finished"
        return ["", state, *[""] * (len(COLUMNS) - 3), failed]
    found, whole = Spread.of(list(chosen.report.values())), Spread.of(list(chosen.whole.values()))
    cost = line.cost(chosen)
    return [
        rate_text(chosen.rate),
        _with_deviation(found),
        f"{found.low:.4f} to {found.high:.4f}" if found.n > 1 else "",
        str(found.n),
        _with_deviation(whole),
        f"{cost['steps']:,.0f}",
        f"{cost['tokens']:,.0f}",
        f"{cost['text_bytes'] / 1e6:.3f}",
        f"{cost['flops']:.3e}",
        f"{cost['seconds'] / 60:.1f}",
        f"{line.tried_seconds / 60:.1f}",
        failed,
    ]


def _with_deviation(spread: Spread) -> str:
    """A mean and its deviation, which a single run does not have."""
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.4f}"
    return f"{spread.mean:.4f}{deviation}"


def markdown(lines: list[Line]) -> str:
    """The table of variants, the table of every rate, and the notes."""
    winner = best(lines)
    text = [_row(["", *COLUMNS]), _row(["---", *["---:"] * len(COLUMNS)])]
    for line in lines:
        cells = [escaped(line.label), *cells_of(line)]
        text.append(_row([f"**{c}**" if c and line is winner else c for c in cells]))
    text += ["", "Bold: the lowest mean.", "", "Every rate (*: chosen):", ""]
    text += [_row(["", "rate", "select", "report", "all documents", "n", "failed"])]
    text += [_row(["---", *["---:"] * 6])]
    for line in lines:
        for cell in line.cells:
            text.append(_row([escaped(line.label), *_rate_cells(cell, cell is line.chosen)]))
    return "\n".join([*text, "", *(f"- {note}" for note in NOTES)]) + "\n"


def _rate_cells(cell: Cell, chosen: bool) -> list[str]:
    kinds = (cell.select, cell.report, cell.whole)
    numbers = [_with_deviation(Spread.of(list(kind.values()))) if kind else "" for kind in kinds]
    mark = " \\*" if chosen else ""
    return [f"{rate_text(cell.rate)}{mark}", *numbers, str(len(cell.whole)), str(len(cell.failed))]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def csv_text(lines: list[Line]) -> str:
    """One line for every variant and rate, with full precision."""
    rows = []
    for line in lines:
        for cell in line.cells:
            row: dict[str, object] = {
                "variant": line.name,
                "label": line.label,
                "rate": rate_text(cell.rate),
                "chosen": int(cell is line.chosen),
                "n": len(cell.whole),
                "failed": len(cell.failed),
            }
            for kind in ("select", "report", "whole"):
                values = list(getattr(cell, kind).values())
                spread = asdict(Spread.of(values)) if values else {}
                for key in ("mean", "deviation", "low", "high"):
                    row[f"{kind}_{key}"] = spread.get(key)
            cost = line.cost(cell)
            keys = ("steps", "tokens", "text_bytes", "flops", "seconds")
            rows.append(row | {key: cost.get(key) for key in keys})
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def study_values(
    study: Study, lines: list[Line], records: dict[str, dict], failed: dict[str, str], command: str
) -> dict:
    """What `study.json` holds, but for the hashes of the other files."""
    winner = best(lines)
    runs = []
    for run in study.runs:
        config = study.file.output_dir / RUNS / run.name / CONFIG
        state = "failed" if run.name in failed else "done" if run.name in records else "missing"
        runs.append(
            {
                "run": run.name,
                "variant": run.variant,
                "rate": run.rate,
                "seed": run.seed,
                "state": state,
                "reason": failed.get(run.name),
                "command": f"s2t2 train {config}",
                **records.get(run.name, {"recipe_sha256": run.recipe_sha256}),
            }
        )
    return {
        "kind": "study",
        "format": FORMAT,
        "file": {"path": str(study.path), "sha256": study.sha256},
        "study": study.file.model_dump(mode="json"),
        "command": command,
        "halves": RULE,
        "lines": [
            {
                "variant": line.name,
                "label": line.label,
                "best": line is winner,
                "chosen": line.chosen and line.chosen.rate,
                "report": line.chosen and asdict(Spread.of(list(line.chosen.report.values()))),
                "whole": line.chosen and asdict(Spread.of(list(line.chosen.whole.values()))),
                "cost": line.chosen and line.cost(line.chosen),
                "tried_seconds": line.tried_seconds,
                "failed": line.failed,
            }
            for line in lines
        ],
        "runs": runs,
    }


def write_results(study: Study, lines: list[Line], values: dict) -> None:
    """Write both tables, then `study.json` with the hashes of all results."""
    out = study.output_dir
    artifacts.write_text(out / TABLE_MD, markdown(lines))
    artifacts.write_text(out / TABLE_CSV, csv_text(lines))
    names = [name for name in (TABLE_MD, TABLE_CSV, FIGURE) if (out / name).exists()]
    hashes = {name: artifacts.sha256_file(out / name) for name in names}
    artifacts.write_json(out / STUDY_JSON, {**values, "files": hashes})
