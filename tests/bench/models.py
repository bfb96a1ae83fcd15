"""The table of docs/models.md, which architectures translate: `python -m tests.bench.models`.

For every causal LM that transformers lists, a tiny model with random weights is translated to a
selection of its own tokens, for which every logit is known: that of the model itself.
"""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from data_prep.tokenizer import train_tokenizer
from s2t2_dist.comm import Comm
from s2t2_dist.data.evaluate import sum_of_nats
from s2t2_dist.errors import S2T2Error
from s2t2_dist.lm.fold import fold, require_translatable
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.load import token_rows
from s2t2_dist.lm.probe import (
    difference,
    plain_logits,
    probe_engine,
    probe_rows,
    require_folded,
)
from s2t2_dist.lm.slots import VocabularySlots
from tests.lm.families import make_model, tiny_config

PAGE = Path("docs/models.md")
MARKS = ("<!-- made by python -m tests.bench.models -->\n", "<!-- end -->\n")
VOCABULARY, SELECTED = 300, 40
EXACT = 1e-5  # of the largest logit: float32 sums in another order
SPECIAL = {"eos_token_id": 0, "pad_token_id": 1}


def outcome(model_type: str, tokenizer: Path) -> str:
    """ "exact", or why not: what the user is told, or what this script does not know."""
    try:
        config = tiny_config(model_type, VOCABULARY)
    except Exception as error:  # of any kind
        return f"not tried: no small config ({_short(error)})"
    folder = Path(tempfile.mkdtemp())
    try:
        try:
            base = make_model(config, tokenizer, folder / "base")
            plain_logits(base, probe_rows(SELECTED, torch.device("cpu")))
        except Exception as error:
            return f"not tried: {_short(error)}"
        try:
            return _translate(folder)
        except S2T2Error as error:
            told = str(error).replace(str(folder), "").lstrip("/")
            return f"refused: {told.removeprefix('base: ')}"
        except Exception as error:
            return f"TRACEBACK: {_short(error)}"
    finally:
        shutil.rmtree(folder)


@torch.no_grad()
def _translate(folder: Path) -> str:
    """Translate to a selection of tokens, in the model and as a folder, and compare."""
    base = folder / "base"
    weights = WeightFiles(base)
    weights.check()
    require_translatable(weights, SELECTED)
    chosen_S = torch.arange(2, VOCABULARY, VOCABULARY // SELECTED)[:SELECTED]
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = token_rows(lm, weights, chosen_S)
    slots = VocabularySlots(lm)

    def logits(ids_BT: torch.Tensor) -> torch.Tensor:
        slots.fill(*rows)
        return lm(input_ids=ids_BT, use_cache=False).logits

    ids_BT = probe_rows(SELECTED, torch.device("cpu"))
    expected = plain_logits(base, chosen_S[ids_BT])[..., chosen_S]
    probe_engine(logits, ids_BT, lambda: expected, False, Comm(), torch.float32)
    (folder / "folded").mkdir()
    fold(base, folder / "folded", lambda weight, _: weight[chosen_S], SPECIAL)
    given, folded = logits(ids_BT), plain_logits(folder / "folded", ids_BT)
    require_folded(*(_loss(each, ids_BT) for each in (given, folded)), torch.float32)
    off = max(difference(given, expected), difference(folded, expected))
    return "exact" if off < EXACT else f"WRONG: off by {off:.1e}"


def _loss(logits_BTU: torch.Tensor, ids_BT: torch.Tensor) -> float:
    return float(sum_of_nats(logits_BTU, ids_BT)) / ids_BT[:, 1:].numel()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def outcomes(model_types: list[str]) -> dict[str, str]:
    """By model type, with progress on stderr."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "text.txt").write_text("".join(map(chr, range(33, 127))) * 40)
        tokenizer = Path(room) / "tokenizer"
        train_tokenizer([Path(room) / "text.txt"], tokenizer, VOCABULARY)
        for number, name in enumerate(model_types, 1):
            found[name] = outcome(name, tokenizer)
            print(f"{number}/{len(model_types)} {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, str]) -> str:
    """Markdown: the exact ones in one paragraph, the others in a table."""
    exact = [f"`{name}`" for name, what in found.items() if what == "exact"]
    lines = [f"Exact ({len(exact)} of {len(found)}): {', '.join(exact)}.", ""]
    lines += ["| model type | what happens |", "|---|---|"]
    lines += [
        f"| `{name}` | {what.replace('|', '/')} |"
        for name, what in found.items()
        if what != "exact"
    ]
    return "\n".join(lines) + "\n"


def page(made: str) -> str:
    """docs/models.md with another table."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + made + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page(table(outcomes(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))))
