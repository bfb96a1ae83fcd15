"""What a recipe needs: memory of each rank, traffic of a step, disk.

By arithmetic from the model's config, the recipe and the DeepSpeed settings, and by a dry run of
one pass (`dryrun`). No weights are read and nothing is measured here; `tests.bench.memory`
compares the result with measured peaks on CPU ranks.

Shapes: V source rows, U target vocabulary, D width, W ranks, N weights of the model.
"""

from dataclasses import asdict, dataclass, field
from math import ceil

from transformers import PretrainedConfig

from s2t2_dist.config import Recipe, Stage, Translate
from s2t2_dist.lm import engine
from s2t2_dist.lm.sizes import (
    BYTES,
    CHECKPOINT_BYTES,
    SINGLE,
    accumulation_dtype,
    count_weights,
    plan_count,
    trained_config,
    weight_states,
)
from s2t2_dist.ot.sizes import rank_memory, rank_traffic, sent
from s2t2_dist.sizing.dryrun import Pass, pass_bytes

# DeepSpeed's own defaults of what the settings leave out, in elements.
DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "zero_hpz_partition_size": 1,
}
# Of C, E and L: what lives through the passes of a step, between its solve and its backward.
THROUGH_PASSES = ("C", "AdamW moments", "rows of E and L", "E', L'", "gradients of E', L'")


@dataclass(frozen=True)
class Hardware:
    """W ranks on nodes of `per_node`. On a CPU untouched memory is not resident."""

    ranks: int
    per_node: int = 8
    cpu: bool = False

    @property
    def nodes(self) -> int:
        return ceil(self.ranks / self.per_node)


@dataclass(frozen=True)
class Inputs:
    """What is known beside the recipe.

    Attributes:
        config: of the source model.
        source_rows: V, rows of P.
        vocab_size: U, tokens of the data.
        context: T, tokens of a row.
    """

    config: PretrainedConfig
    source_rows: int
    vocab_size: int
    context: int


@dataclass(frozen=True)
class StageSize:
    """One stage under one DeepSpeed JSON, in bytes of the largest rank.

    Attributes:
        phases: by phase of the stage, what is held, by name.
        host: of each node, beside the interpreters: what is offloaded.
        traffic: that a rank sends in one optimizer step, at most, by name.
        checkpoint: on disk.
        result: on disk at the end, and the folder that the stage starts from; of P at most.
    """

    stage: str
    passes: int
    phases: dict[str, dict[str, int]]
    host: int
    traffic: dict[str, int]
    checkpoint: int
    result: int
    totals: dict[str, int] = field(init=False)

    def __post_init__(self):
        totals = {phase: sum(parts.values()) for phase, parts in self.phases.items()}
        object.__setattr__(self, "totals", totals)

    @property
    def peak_phase(self) -> str:
        return max(self.totals, key=self.totals.get)

    @property
    def peak(self) -> int:
        return self.totals[self.peak_phase]

    def values(self) -> dict:
        """As JSON."""
        return {**asdict(self), "peak_phase": self.peak_phase, "peak": self.peak}


def size_stage(
    recipe: Recipe, stage: Stage, inputs: Inputs, settings: dict, hardware: Hardware
) -> StageSize:
    """What one stage needs.

    Args:
        settings: a ZeRO-3 JSON, from `engine.load_settings`.

    Raises:
        ConfigError: the ranks cannot share the stage's batch.
    """
    kind = _Translate if isinstance(stage, Translate) else _Trained
    return kind(recipe, stage, inputs, settings, hardware).measure()


def run_disk(recipe: Recipe, stages: list[StageSize]) -> int:
    """Bytes on disk of a whole run at its fullest: kept checkpoints and one in the making."""
    kept = (recipe.save_total_limit + 1) * max(stage.checkpoint for stage in stages)
    return kept + sum(stage.result for stage in stages)


class _Stage:
    """What both kinds of stage share."""

    def __init__(
        self, recipe: Recipe, stage: Stage, inputs: Inputs, settings: dict, hardware: Hardware
    ):
        self.recipe, self.stage, self.inputs, self.hardware = recipe, stage, inputs, hardware
        self.zero = {**DEFAULTS, **settings.get("zero_optimization", {})}
        self.size = BYTES[recipe.model.dtype]
        self.reduced = BYTES[settings.get("communication_data_type", recipe.model.dtype)]
        self.accumulated = accumulation_dtype(settings, recipe.model.dtype)
        self.rows, self.passes = engine.split_batch(stage, hardware.ranks)
        self.config = inputs.config
        if not isinstance(stage, Translate):
            self.config = trained_config(inputs.config, stage, inputs.vocab_size)
        self.weights = count_weights(self.config)

    def share(self, elements: int) -> int:
        """Of a rank."""
        return ceil(elements / self.hardware.ranks)

    def offloads(self, what: str) -> bool:
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

    def partition(self, elements: int) -> dict[str, int]:
        """This rank's part of the weights, and hpZ's second one."""
        parts = {"weights": 0 if self.offloads("param") else self.size * self.share(elements)}
        within = self.zero["zero_hpz_partition_size"]
        if within > 1:
            parts["weights, copy in the node"] = self.size * ceil(elements / within)
        return parts

    def gathered(self, elements: int) -> dict[str, int]:
        """Weights that are whole on every rank: at most those that DeepSpeed keeps alive."""
        whole = self.hardware.ranks == 1 and not self.offloads("param")
        live = min(elements, int(self.zero["stage3_max_live_parameters"]))
        return {"gathered weights": 0 if whole else self.size * live}

    def loading(self) -> dict[str, int]:
        """The whole model's partition, and one weight before DeepSpeed cuts it, in float32.

        A tied model is made with a head of its own, which is let go when it is tied.
        """
        whole = SINGLE * self.weights.largest
        made = self.partition(self.weights.total + self.weights.tied_head)
        return made | {"one whole weight": whole}

    def one_pass(self, evaluation: bool = False, trained: bool = True) -> int:
        rows = self.stage.per_device_eval_batch_size if evaluation else self.rows
        what = Pass(
            dtype=self.recipe.model.dtype,
            rows=rows,
            tokens=self.inputs.context,
            vocabulary=self.inputs.vocab_size,
            trained=trained,
            evaluation=evaluation,
            checkpointing=self.recipe.model.gradient_checkpointing,
            bucket=int(self.zero["reduce_bucket_size"]),
            reduced_bytes=self.reduced,
        )
        return pass_bytes(self.config, what)

    def gather_traffic(self, elements: int, frozen: bool = False) -> dict[str, int]:
        """Weights are gathered in each forward and again in each backward pass.

        hpZ's copy in the node serves all of them but the first after the weights have changed.
        """
        once = sent(self.size * elements, self.hardware.ranks) // 2
        within = int(self.zero["zero_hpz_partition_size"])
        if within == 1:
            return {"gathering weights": 2 * self.passes * once}
        changed = 0 if frozen else 1
        inside = sent(self.size * elements, within) // 2 * (2 * self.passes - changed)
        return {"gathering weights": changed * once, "gathering weights in the node": inside}


class _Trained(_Stage):
    """Every weight learns: `stages.WeightStage` on `engine.TrainedLM`."""

    def measure(self) -> StageSize:
        N, share = self.weights.total, self.share(self.weights.total)
        ranks, dtype = self.hardware.ranks, self.recipe.model.dtype
        state = weight_states(N, ranks, dtype, self.accumulated)
        del state["weights"]  # in `partition`
        offloaded, host = self.offloads("optimizer"), 0
        if offloaded:  # gradients as they are summed and as its AdamW wants them, master, moments
            host = (BYTES[self.accumulated] + 4 * SINGLE) * share
            state = {}
        if self.offloads("param"):
            host += self.size * share
        bucket = int(self.zero["reduce_bucket_size"])
        bucket = self.reduced * (min(bucket, N) if self.hardware.cpu else bucket)
        static = self.partition(N) | state | {"reduce bucket": bucket}
        gathered = self.gathered(N)
        group = min(share, int(self.zero["sub_group_size"]) + self.share(self.weights.largest))
        updating = {"gradients of a sub-group": SINGLE * group, "AdamW's temporaries": 8 * group}
        phases = {
            "loading": self.loading(),
            "passes": static | gathered | {"activations, logits": self.one_pass()},
            "update": static | ({} if offloaded else updating),
            "evaluation": static | gathered | {"activations, logits": self.one_pass(True)},
        }
        reduced = self.passes * sent(self.reduced * N, self.hardware.ranks) // 2
        return StageSize(
            stage=self.stage.name,
            passes=self.passes,
            phases=phases,
            host=host * min(self.hardware.per_node, self.hardware.ranks),
            traffic=self.gather_traffic(N) | {"reducing gradients": reduced},
            checkpoint=CHECKPOINT_BYTES * N,
            result=2 * self.size * N,
        )


class _Translate(_Stage):
    """C learns through the frozen model: `translate.TranslateStage`."""

    def measure(self) -> StageSize:
        stage, ranks, N = self.stage, self.hardware.ranks, self.weights.backbone
        V, U, D = self.inputs.source_rows, self.inputs.vocab_size, self.weights.width
        plans, separate = plan_count(stage), stage.plans == "separate"
        shared = self.weights.tied_head > 0 and stage.source_marginal == "uniform"
        # The other methods keep the thresholds of one iteration, or none.
        kept = stage.iterations if stage.method == "dykstra" else 1
        held = rank_memory(V, U, D, ranks, kept, tied=shared and not separate)
        if separate:
            held |= {name: 2 * held[name] for name in held if name.endswith("C") or "AdamW" in name}
        static = self.partition(N)
        gathered = self.gathered(N)
        through = {name: held[name] for name in THROUGH_PASSES}
        evaluating = {name: held[name] for name in THROUGH_PASSES if "gradients" not in name}
        activations = {"activations, logits": self.one_pass(trained=False)}
        evaluation = {"activations, logits": self.one_pass(True, trained=False)}
        return StageSize(
            stage=stage.name,
            passes=self.passes,
            phases={
                "loading": self.loading(),
                "passes": static | gathered | through | activations,
                "translator": static | gathered | held,
                "evaluation": static | gathered | evaluating | evaluation,
            },
            host=0,
            traffic=self.gather_traffic(N, frozen=True)
            | {
                f"translator: {name}": sent(payload, ranks)
                for name, payload in rank_traffic(U, D, stage.iterations).items()
            },
            checkpoint=plans * CHECKPOINT_BYTES * V * U,
            result=plans * 2 * SINGLE * V * U,
        )
