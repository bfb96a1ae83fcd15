"""The translate stage: the LM is frozen and partitioned, this rank's rows of C learn.

C lives outside the engine, with its own AdamW; there are two where E and L have a plan each. Per
optimizer step: one solve gives E' and L' as leaf tensors; the micro-batches accumulate into their
gradients; one backward through the solve gives the gradient of this rank's rows.

Shapes: V and U source and target vocabulary, D width, R source rows of this rank.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from s2t2_dist.comm import agree, world_comm
from s2t2_dist.config import Translate
from s2t2_dist.data.batches import Batch
from s2t2_dist.data.evaluate import sum_of_nats
from s2t2_dist.data.shards import tokenizer_sha256
from s2t2_dist.errors import DataError, collective
from s2t2_dist.lm import engine
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.init import mixture_weights, warm_start
from s2t2_dist.lm.load import load_lm, token_rows
from s2t2_dist.lm.probe import plain_logits, probe_engine, probe_rows
from s2t2_dist.lm.translation import TRANSLATION_DIR, save_translation
from s2t2_dist.lm.vocabulary import source_rows, target_marginal
from s2t2_dist.ot import Translator, make_solver, row_range
from s2t2_dist.training.context import Context, or_nan
from s2t2_dist.training.translate_checkpoint import load_plans, save_plans

# Measured (V = 1,000 and 4,096, U = 64 to 2,048): learning rates that work keep 11 entries of C or
# more with gradient per source token; those that kill (1 row mass, 0.01 of probability) fall below
# 4 within 5 to 20 steps and to almost none later. A row that has a gradient has 2 such entries.
LEAST_GRADIENTS_PER_ROW = 4
MOST_LEAST_SHARE = 1 / 16  # of C, where U is so small that 4 of a row are a larger share
PROBED = 64  # tokens of the source, about, with which the engine is probed

_log = logging.getLogger(__name__)


class TranslateStage:
    """Learns the transport plan through the frozen LM (paper, section 2)."""

    def __init__(self, context: Context, stage: Translate):
        self.context = context
        self.stage = stage
        weights = context.base
        self.folder = weights.folder
        tokens, mu = source_rows(stage, weights)
        start, stop = row_range(len(tokens), context.comm.rank, context.comm.size)
        self.rows = (start, stop)
        self.source_vocab_size = weights.vocabulary.size
        self.target_marginal = target_marginal(stage.target_marginal, context.train)
        first_plan = None
        if stage.warm_start is not None:
            mixture = self._mixture(stage.warm_start, weights)
            share = stage.warm_start_share
            mu, plan = warm_start(mixture, tokens, mu, self.target_marginal, share)
            first_plan = plan(slice(start, stop))
        self.token_ids_R, self.source_marginal = tokens[start:stop], mu[start:stop]
        settings = engine.engine_settings(
            context.deepspeed, context.recipe.model, stage, context.comm.size
        )
        lm = load_lm(self.folder, context.recipe.model, settings)
        matrices = token_rows(lm, weights, self.token_ids_R)
        self.width = matrices.embed_RD.shape[1]
        self.probed_S = tokens[:: max(1, len(tokens) // PROBED)]
        self.probed = token_rows(lm, weights, self.probed_S)
        self.lm = engine.FrozenLM(lm, settings, context.recipe.model.gradient_checkpointing)
        self.translator = Translator(
            *matrices.side_by_side(context.device),
            self.source_marginal,
            self.target_marginal,
            solver=make_solver(stage.method, stage.iterations, stage.tolerance),
            embed_scale=stage.embed_scale,
            units=stage.units,
            plans=stage.plans,
            first_plan_VU=first_plan,
            comm=world_comm(context.recipe.collective_timeout),
        )
        self.optimizer = torch.optim.AdamW(
            self.translator.costs,
            lr=stage.learning_rate,
            betas=(stage.adam_beta1, stage.adam_beta2),
            eps=stage.adam_epsilon,
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.warned = False
        self.translated = None

    def _mixture(self, init: str, weights: WeightFiles) -> torch.Tensor:
        """The start's weights (U, V), rank 0's on every rank."""
        comm, data, seed = self.context.comm, self.context.train, self.context.recipe.seed

        def make() -> torch.Tensor | None:
            return mixture_weights(init, weights, data, seed) if comm.rank == 0 else None

        return comm.broadcast_object(agree(comm, make, f"making the start {init}"))

    def probe(self) -> None:
        """Give the engine rows of E and L as E' and L': it must say what the model says of them."""
        context, dtype = self.context, getattr(torch, self.context.recipe.model.dtype)
        probed_S = self.probed_S.to(context.device)
        vocabulary = self.probed.to(context.device)

        def logits(ids_BT: torch.Tensor, *positions: torch.Tensor) -> torch.Tensor:
            return self.lm.logits(ids_BT, vocabulary, *positions)

        def expected() -> torch.Tensor:
            return plain_logits(self.folder, probed_S[ids_BT], dtype)[..., self.probed_S]

        ids_BT = probe_rows(len(probed_S), context.device)
        mask = context.recipe.data.document_mask
        probe_engine(logits, ids_BT, expected, mask, context.comm, dtype)

    def evaluation_mode(self, on: bool) -> None:
        """Solve once for a whole evaluation."""
        self.lm.train_mode(not on)
        if on:
            with finite_cost(self.stage):
                self.translated = self.translator.translate()
        else:
            self._forget()

    def _forget(self) -> None:
        """Free E' and L', of which the model has copies."""
        self.translated = None
        self.lm.slots.clear()

    def logits(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Next-target-token logits (B, T, U) under the plan of the current step."""
        embed_UK, head_UK, D = self.translated.embed_UD, self.translated.head_UD, self.width
        bias_U = head_UK[:, D] if head_UK.shape[1] > D else None
        vocabulary = embed_UK[:, :D], head_UK[:, :D], bias_U
        return self.lm.logits(input_ids_BT, vocabulary, position_ids_BT)

    def train_step(
        self, batches: list[Batch], predicted: int, learning_rate: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        clock = _Clock(self.context.device)
        with finite_cost(self.stage):
            self.translated = self.translator.translate()
        clock.lap("translator")
        nats = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for batch in batches:
            batch = batch.to(self.context.device)
            loss = sum_of_nats(self.logits(batch.input_ids, batch.position_ids), batch.labels)
            or_nan(loss / predicted).backward()
            nats += loss.detach()
        clock.lap("lm")
        self.translator.backward(self.translated, self.stage.entropy_weight)
        grad_norm = self.translator.clip_grad_norm(self.stage.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        finite = math.isfinite(grad_norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._forget()
        clock.lap("translator")
        statistics = self.translator.statistics()
        if finite:
            self._warn_once(statistics)
        return nats, {
            "grad_norm": grad_norm,
            "translator_seconds": clock.seconds["translator"],
            "lm_seconds": clock.seconds["lm"],
            **statistics,
        }

    def _warn_once(self, statistics: dict[str, float]) -> None:
        """Say, on rank 0 and once per start, that gradients are dying while some are left."""
        share = min(v for key, v in statistics.items() if key.endswith("gradient_share"))
        if self.warned or share >= least_gradient_share(len(self.target_marginal)):
            return
        self.warned = True
        if self.context.comm.rank == 0:
            _log.warning(dying(self.stage, share))

    def save(self, directory: Path) -> None:
        save_plans(directory, self.rows, self.translator, self.optimizer)

    def load(self, directory: Path, world_size: int) -> None:
        """Restore this rank's rows, whichever ranks wrote them.

        Raises:
            ArtifactError: on every rank, where the checkpoint does not hold every row.
        """
        state = (directory, self.rows, self.translator, self.optimizer)
        agree(self.context.comm, lambda: load_plans(*state), f"reading {directory}")

    def finish(self, record: dict) -> None:
        """Write `translation/`."""
        target = self.context.run_dir / TRANSLATION_DIR
        with finite_cost(self.stage):
            plans = self.translator.plan_tiles()
        save_translation(
            target,
            self.context.comm,
            plans=plans,
            source_token_ids=self.token_ids_R,
            source_marginal=self.source_marginal,
            target_marginal=self.target_marginal,
            source_tokenizer_sha256=tokenizer_sha256(self.folder),
            target_tokenizer_sha256=self.context.train.metadata["tokenizer_sha256"],
            embed_scale=self.stage.embed_scale,
            vocab_size=self.source_vocab_size,
            info={**record, "statistics": self.translator.statistics()},
        )

    def close(self) -> None:
        self.lm.close()


@contextlib.contextmanager
def finite_cost(stage: Translate) -> Iterator[None]:
    """Turn the transport's refusal of a C that is not finite into the user's error.

    Raises:
        DataError: on every rank.
    """
    try:
        yield
    except ValueError as error:
        rate = f"lower learning_rate ({stage.learning_rate:g}) in a new output_dir"
        raise collective(DataError(f"stage {stage.name}: {error}; {rate}")) from error


def least_gradient_share(columns: int) -> float:
    """The share of C (V, U = columns) with gradient below which learning is about to end."""
    return min(LEAST_GRADIENTS_PER_ROW / columns, MOST_LEAST_SHARE)


def dying(stage: Translate, share: float) -> str:
    """What to tell a user whose C hardly has a gradient any more."""
    units = "" if stage.units == "row_mass" else "take units row_mass, or "
    return (
        f"stage {stage.name}: only {share:.2%} of C has a gradient; an entry without one no longer "
        f"learns, and at 0% nothing does: {units}lower learning_rate ({stage.learning_rate:g})"
    )


class _Clock:
    """Seconds per part of a step, with the device's queue drained at each lap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
