"""DeepSpeed engines. The only module that imports `deepspeed`.

`TrainedLM` trains every weight under ZeRO with AdamW; `FrozenLM` only partitions the weights.
Both take a model that `load.load_lm` loaded under the same DeepSpeed settings.
"""

import copy
import gc
import json
import logging
import os
import socket
import warnings
from functools import partial
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from transformers.utils.logging import disable_progress_bar

from s2t2_dist import comm
from s2t2_dist.config import ModelConfig, Stage
from s2t2_dist.errors import ConfigError
from s2t2_dist.lm.slots import VocabularySlots, recompute_only

# Set from the recipe only; a DeepSpeed JSON must not contain them.
RECIPE_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)
SHARED_MEMORY_OP = "deepspeed_shm_comm"
KNOWN_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "steps_per_print",
    "aio",
)


def init_distributed(timeout: float) -> torch.device:
    """Join the job set up by the launcher, or a job of one rank; returns this rank's device.

    Args, Raises: see `comm.join`.
    """
    _quiet()
    if not comm.is_launched():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if not on_cpu:
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    comm.join(backend, timeout)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for inference, which training
    # never calls. If a rank is killed, it leaves its lock and buffers behind.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(backend, verbose=False)
    # Otherwise the groups that DeepSpeed creates would have torch's default timeout.
    deepspeed.comm.comm.cdb.new_group = partial(comm.new_group, timeout)
    return torch.device(accelerator.current_device_name())


def compile_lock() -> str | None:
    """What to say of a lock under which another process compiles an operator; None without one.

    PyTorch waits for it without a word and without an end.
    """
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    lock = next((path for path in folder.rglob("lock") if path.is_file()), None)
    if lock is None:
        return None
    host = socket.gethostname()
    return f"{host} may wait for a process that compiles ({lock}); if none does, remove that file"


def load_settings(path: Path) -> dict:
    """Read a DeepSpeed JSON and check its top-level keys (DeepSpeed ignores unknown ones).

    Raises:
        ConfigError: the file is missing or not JSON, or has an unknown or a recipe-owned key.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"deepspeed: {path} does not exist; see ds_configs/README.md") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path} is not JSON ({error})") from None
    for key in settings:
        if key in RECIPE_OWNED:
            raise ConfigError(f"{path}: {key} is set by the recipe; remove it from this file")
        if key not in KNOWN_KEYS:
            raise ConfigError(f"{path}: unknown key {key}; expected some of {list(KNOWN_KEYS)}")
    return settings


def engine_settings(settings: dict, model: ModelConfig, stage: Stage, world_size: int) -> dict:
    """The full DeepSpeed settings of a stage: the JSON plus the recipe's numbers.

    Raises:
        ConfigError: the global batch is not a multiple of the number of ranks.
    """
    micro_batch, accumulation = split_batch(stage, world_size)
    zero = {"memory_efficient_linear": False, **settings.get("zero_optimization", {})}
    return {
        "steps_per_print": 2**62,
        **settings,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
    }


def split_batch(stage: Stage, world_size: int) -> tuple[int, int]:
    """Micro-batch size of a rank in rows, and gradient accumulation steps.

    The micro-batch is the largest divisor of a rank's share of the batch that does not exceed
    `per_device_train_batch_size`. One recipe thus runs on any number of ranks that divides its
    batch.

    Raises:
        ConfigError: the global batch is not a multiple of the number of ranks.
    """
    share, rest = divmod(stage.train_batch_size, world_size)
    if rest:
        raise ConfigError(
            f"stages.{stage.name}.train_batch_size is {stage.train_batch_size}, not a multiple of "
            f"the {world_size} ranks; choose a multiple or another number of ranks"
        )
    most = min(share, stage.per_device_train_batch_size)
    rows = next(rows for rows in range(most, 0, -1) if share % rows == 0)
    return rows, share // rows


class TrainedLM:
    """A causal LM whose every weight is trained under ZeRO with AdamW.

    Args:
        settings: from `engine_settings`.
    """

    def __init__(self, model: torch.nn.Module, settings: dict, stage: Stage):
        offload = settings["zero_optimization"].get("offload_optimizer") or {}
        optimizer = {
            "lr": stage.learning_rate,
            "betas": [stage.adam_beta1, stage.adam_beta2],
            "eps": stage.adam_epsilon,
            "weight_decay": stage.weight_decay,
            "adam_w_mode": True,
            # DeepSpeed's own AdamW, which offloading needs, must be compiled (on CUDA with nvcc).
            "torch_adam": offload.get("device", "none") == "none",
        }
        self.accumulation = settings["gradient_accumulation_steps"]
        config = {**settings, "optimizer": {"type": "AdamW", "params": optimizer}}
        self.engine, *_ = deepspeed.initialize(model=model, config=config)
        if settings["zero_optimization"].get("stage", 0) in (1, 2):
            self.engine.optimizer.check_grad_overflow = True  # off in float32 by default

    def logits(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Next-token logits (B, T, vocabulary)."""
        return _logits(self.engine, input_ids_BT, position_ids_BT)

    def train_mode(self, on: bool) -> None:
        self.engine.train(on)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, summed over ranks and micro-batches.

        DeepSpeed averages over ranks and accumulation steps; the factor here undoes both.
        """
        self.engine.backward(loss * (self.accumulation * self.engine.world_size))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip and apply the accumulated gradient; returns its norm before clipping.

        If the norm is non-finite, DeepSpeed skips the update on every rank: weights and moments
        do not change.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, directory: Path) -> None:
        """Write this rank's weights, moments and step count below `directory`. A collective.

        `save_checkpoint` ends in a barrier. If this rank raised before it, for example on a full
        disk, the other ranks would wait there. So a write error is raised after the barrier.

        Raises:
            OSError, RuntimeError: this rank could not write (torch raises both on a full disk).
        """
        files, failures = self.engine.checkpoint_engine, []
        write = files.save

        def write_or_keep_the_failure(state_dict: dict, path: str) -> None:
            try:
                write(state_dict, path)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        files.save = write_or_keep_the_failure
        # Rank 0 would copy a recovery script, which does not fit this layout of checkpoints.
        self.engine._copy_recovery_script = lambda _: None
        try:
            self.engine.save_checkpoint(str(directory), tag="engine", save_latest=False)
        finally:
            files.save = write
        if failures:
            raise failures[0]

    def load(self, directory: Path, universal: bool = False) -> None:
        """Restore what `save` wrote at the same world size, or a universal copy at any world size.

        DeepSpeed unpickles the files: the caller must have verified them.
        """
        self.engine._config.load_universal_checkpoint = universal
        loaded, _ = self.engine.load_checkpoint(
            str(directory), tag="engine", load_lr_scheduler_states=False
        )
        assert loaded is not None, "DeepSpeed found no files (it only logs a warning)"
        self.engine._config.load_universal_checkpoint = False
        if universal:
            # After a universal load all sub-groups share one step tensor; each would increment it.
            for state in self.engine.optimizer.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """Every weight and persistent buffer, on rank 0's CPU; None elsewhere. A collective."""
        keep = self.engine.global_rank == 0
        module, weights = self.engine.module, {}
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    weights[name] = parameter.detach().cpu().clone()
        persistent = module.state_dict(keep_vars=True).keys()
        for name, buffer in module.named_buffers():
            if keep and name in persistent:
                weights[name] = buffer.detach().cpu().clone()
        return weights if keep else None

    def close(self) -> None:
        """Give the memory back before the next stage."""
        self.engine.destroy()
        del self.engine
        _clean_up()


class FrozenLM:
    """A frozen causal LM under ZeRO-3 whose vocabulary is given anew in each forward pass.

    This rank keeps its partition of the other weights, and neither optimizer nor weight gradients.

    Args:
        model: from `load_lm`; it loses its own vocabulary.
        settings: from `engine_settings`.
        recompute: whether activations are recomputed in the backward pass.
    """

    def __init__(self, model: torch.nn.Module, settings: dict, recompute: bool):
        model.requires_grad_(False)
        self.slots = VocabularySlots(model)
        self.engine, *_ = deepspeed.initialize(model=model, config=settings)
        self.recompute = recompute
        self.train_mode(True)

    def train_mode(self, on: bool) -> None:
        """Recompute activations if it is on and was asked for; there is never any dropout."""
        recompute_only(self.engine.module, on and self.recompute)

    def logits(
        self,
        input_ids_BT: torch.Tensor,
        vocabulary: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        position_ids_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token logits (B, T, U) with E', L' (U, D) and b' (U,) in the model's own forward."""
        self.slots.fill(*vocabulary)
        # Not the engine itself: it wants the loss to go through its own backward.
        return _logits(self.engine.module, input_ids_BT, position_ids_BT)

    def close(self) -> None:
        """Give the memory back before the next stage."""
        self.engine.destroy()
        del self.engine, self.slots
        _clean_up()


def _logits(
    lm: torch.nn.Module, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None
) -> torch.Tensor:
    """Some architectures take no position ids."""
    positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    return lm(input_ids=input_ids_BT, **positions, use_cache=False).logits


def gathered_rows(parameter: torch.nn.Parameter, rows_R: torch.Tensor) -> torch.Tensor:
    """Rows of a partitioned weight, float32. A collective: each rank gets its own rows."""
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach()[rows_R.to(parameter.device)].float()


def _quiet() -> None:
    """Suppress the libraries' progress bars and deprecation warnings."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*_all_gather_base.*|.*_reduce_scatter_base.*")


def _clean_up() -> None:
    # hpZ's process group outlives its engine; DeepSpeed refuses to create a second one.
    group = groups._get_zero_param_intra_parallel_group()
    if group is not None:
        deepspeed.comm.destroy_process_group(group)
    gc.collect()
    get_accelerator().empty_cache()
