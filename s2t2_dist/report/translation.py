"""Inspection of a learned plan: its statistics, and its sharpest target tokens as text.

Shapes: R source tokens with a row of P, U target tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s2t2_dist.data.shards import TOKENIZER_DIR, tokenizer_sha256
from s2t2_dist.errors import DataError
from s2t2_dist.lm.translation import Translation, load_translation

TOKENS_SHOWN = 20
USES = {"plan": "", "embed": " (for E)", "head": " (for L)"}  # plan name -> suffix of titles


@dataclass(frozen=True)
class PlanSummary:
    """Statistics of a plan of total mass 1.

    Attributes:
        entropy: H(P) = -sum P log P in nats; log(R * U) if P is uniform.
        row_error, col_error: largest error of a row or column sum, relative to its marginal.
    """

    rows: int
    columns: int
    nonzeros: int
    entropy: float
    row_error: float
    col_error: float

    @property
    def nonzeros_per_row(self) -> float:
        return self.nonzeros / self.rows

    @property
    def nonzeros_per_column(self) -> float:
        return self.nonzeros / self.columns

    @property
    def nonzero_share(self) -> float:
        return self.nonzeros / (self.rows * self.columns)


def summarize(translation: Translation) -> dict[str, PlanSummary]:
    """The statistics of each plan, by name: "plan", or "embed" and "head" if they are separate."""
    return {name: _summarize(translation, plan) for name, plan in translation.plans.items()}


def _summarize(translation: Translation, plan: torch.Tensor) -> PlanSummary:
    values = plan.values().double()
    sums = [
        torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)
        for size, index in zip(plan.shape, plan.indices(), strict=True)
    ]
    marginals = (translation.source_marginal, translation.target_marginal)
    row_error, col_error = (
        float(((found - wanted) / wanted).abs().max())
        for found, wanted in zip(sums, marginals, strict=True)
    )
    return PlanSummary(
        rows=plan.shape[0],
        columns=plan.shape[1],
        nonzeros=int(values.count_nonzero()),
        entropy=float(torch.special.entr(values.clamp_min(0)).sum()),
        row_error=row_error,
        col_error=col_error,
    )


def top_sources(
    translation: Translation, plan: torch.Tensor, column: int, top: int
) -> list[tuple[int, float]]:
    """The source tokens with the largest shares of a target token's mass: (token id, share)."""
    rows, columns = plan.indices()
    chosen = columns == column
    values = plan.values()[chosen].double()
    best = values.topk(min(top, len(values)))
    ids = translation.source_token_ids[rows[chosen][best.indices]]
    return list(zip(ids.tolist(), (best.values / values.sum()).tolist(), strict=True))


def sharpest_columns(plan: torch.Tensor, count: int) -> list[int]:
    """Target tokens with the largest share of their mass from one source token, sharpest first."""
    columns, values = plan.indices()[1], plan.values().double()
    zeros = torch.zeros(plan.shape[1], dtype=torch.float64)
    largest = zeros.scatter_reduce(0, columns, values, "amax")
    share = largest / zeros.index_add(0, columns, values)
    return share.nan_to_num(0).argsort(descending=True, stable=True)[:count].tolist()


def report(
    path: Path,
    top: int = 5,
    source_tokenizer: Path | None = None,
    target_tokenizer: Path | None = None,
) -> Group:
    """A translation as tables for a terminal.

    Args:
        top: source tokens shown for each target token.
        source_tokenizer, target_tokenizer: folders of the tokenizers, for the text of tokens;
            default: those of the run that learned the plan. If they no longer exist, token ids
            are shown.

    Raises:
        ArtifactError: not a translation.
        DataError: a given tokenizer is not the plan's.
    """
    translation = load_translation(path)
    recipe = translation.info.get("recipe", {})
    base = recipe.get("model", {}).get("model_name_or_path")
    data = recipe.get("data", {}).get("path")
    source = _tokenizer(source_tokenizer, base, translation.source_tokenizer_sha256)
    target = _tokenizer(
        target_tokenizer,
        data and Path(data) / TOKENIZER_DIR,
        translation.target_tokenizer_sha256,
    )
    tables = [_tokens(translation, name, top, source, target) for name in translation.plans]
    return Group(_numbers(path, translation), *tables)


def _tokens(
    translation: Translation,
    name: str,
    top: int,
    source: PreTrainedTokenizerBase | None,
    target: PreTrainedTokenizerBase | None,
) -> Table:
    """The sharpest target tokens of one plan, with their source tokens."""
    plan = translation.plans[name]
    table = Table(
        "target token",
        "non-zeros",
        f"top {top} source tokens (share of the column's mass)",
        title=f"The {TOKENS_SHOWN} sharpest target tokens{USES[name]}",
        title_justify="left",
    )
    counts = torch.bincount(plan.indices()[1], minlength=plan.shape[1])
    for column in sharpest_columns(plan, TOKENS_SHOWN):
        sources = top_sources(translation, plan, column, top)
        shown = "  ".join(f"{_text(source, i)} {share:.1%}" for i, share in sources)
        table.add_row(Text(_text(target, column)), f"{int(counts[column]):,}", Text(shown))
    return table


def _numbers(path: Path, translation: Translation) -> Table:
    stages = translation.info.get("recipe", {}).get("stages", [])
    stage = next((s for s in stages if s.get("name") == translation.info.get("stage")), {})
    ending = f" to a row error of {stage['tolerance']:g}" if stage.get("tolerance") else ""
    most = "at most " if ending else ""
    rows, columns = translation.embed_plan.shape
    table = Table(title=str(path), title_justify="left", show_header=False)
    table.add_row(
        "method", f"{stage.get('method')}{ending}, {most}{stage.get('iterations')} iterations"
    )
    table.add_row("embedding scale", translation.embed_scale)
    table.add_row(
        "size",
        f"{rows:,} of {translation.vocab_size:,} source tokens x {columns:,} target tokens",
    )
    for name, summary in summarize(translation).items():
        _add_numbers(table, summary, USES[name])
    return table


def _add_numbers(table: Table, summary: PlanSummary, use: str) -> None:
    largest = torch.tensor(summary.rows * summary.columns).double().log()
    table.add_row(f"non-zeros{use}", f"{summary.nonzeros:,} ({summary.nonzero_share:.2%})")
    table.add_row("  per source token", f"{summary.nonzeros_per_row:.2f}")
    table.add_row("  per target token", f"{summary.nonzeros_per_column:.2f}")
    table.add_row(f"entropy H(P){use}", f"{summary.entropy:.3f} nats (uniform: {largest:.3f})")
    table.add_row(f"largest row error{use}", f"{summary.row_error:.2e} of its marginal")
    table.add_row(f"largest column error{use}", f"{summary.col_error:.2e} of its marginal")


def _tokenizer(
    given: Path | None, default: str | Path | None, sha256: str
) -> PreTrainedTokenizerBase | None:
    folder = given or (Path(default) if default else None)
    try:
        found = tokenizer_sha256(folder) if folder else None
    except DataError:
        if given:
            raise
        found = None
    if found == sha256:
        return AutoTokenizer.from_pretrained(folder)
    if given:
        raise DataError(
            f"{given} is the tokenizer {found[:12]}, but the translation was learned for "
            f"{sha256[:12]}; give that tokenizer"
        )
    return None


def _text(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> str:
    if tokenizer is None:
        return f"#{token_id}"
    return repr(tokenizer.convert_ids_to_tokens(token_id))
