"""DeepSpeed, and nothing else of the project: the only module that imports `deepspeed`.

`TrainedLM` holds every weight under ZeRO with AdamW; `FrozenLM` only partitions the weights.
Both take a model that `model.load_lm` loaded under the same DeepSpeed settings.
"""

import gc
import json
import logging
import os
import socket
import warnings
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers.utils.logging import disable_progress_bar

from s2t2_dist.config import ModelConfig, Stage
from s2t2_dist.errors import ConfigError

# One owner per number: the recipe owns these, so a DeepSpeed JSON must not hold them.
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


def init_distributed(timeout_minutes: float = 30) -> torch.device:
    """Join the job that the launcher describes, or a job of one, and return this rank's device."""
    _quiet()
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in alone.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    return torch.device(accelerator.current_device_name())


def load_settings(path: Path) -> dict:
    """Read a DeepSpeed JSON and check its top-level keys (DeepSpeed accepts any in silence).

    Raises:
        ConfigError: missing, not JSON, an unknown key, or one that the recipe owns.
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
        ConfigError: the global batch is not a multiple of ranks x rows per device.
    """
    accumulation = accumulation_steps(stage, world_size)
    zero = {"memory_efficient_linear": False, **settings.get("zero_optimization", {})}
    return {
        "steps_per_print": 2**62,
        **settings,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": stage.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": stage.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
    }


def accumulation_steps(stage: Stage, world_size: int) -> int:
    """Micro-batches per optimizer step and rank.

    Raises:
        ConfigError: the global batch does not divide.
    """
    rows = stage.per_device_train_batch_size * world_size
    if stage.train_batch_size % rows:
        raise ConfigError(
            f"stages.{stage.name}.train_batch_size is {stage.train_batch_size}, not a multiple of "
            f"{world_size} ranks x per_device_train_batch_size {stage.per_device_train_batch_size}"
        )
    return stage.train_batch_size // rows


class TrainedLM:
    """A causal LM whose every weight is trained under ZeRO with AdamW.

    Args:
        settings: from `engine_settings`.
    """

    def __init__(self, model: torch.nn.Module, settings: dict, stage: Stage):
        cpu = get_accelerator().device_name() == "cpu"
        optimizer = {
            "lr": stage.learning_rate,
            "betas": [stage.adam_beta1, stage.adam_beta2],
            "eps": stage.adam_epsilon,
            "weight_decay": stage.weight_decay,
            "adam_w_mode": True,
            **({"torch_adam": True} if cpu else {}),
        }
        self.accumulation = settings["gradient_accumulation_steps"]
        config = {**settings, "optimizer": {"type": "AdamW", "params": optimizer}}
        self.engine, *_ = deepspeed.initialize(model=model, config=config)

    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Next-token logits (B, T, vocabulary)."""
        return self.engine(input_ids=input_ids_BT, use_cache=False).logits

    def train_mode(self, on: bool) -> None:
        self.engine.train(on)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of `loss`, whose sum over ranks and micro-batches counts.

        DeepSpeed divides by ranks and by accumulation steps; both are undone here.
        """
        self.engine.backward(loss * (self.accumulation * self.engine.world_size))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, learning_rate: float) -> float:
        """Clip and apply the accumulated gradient; returns its norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, directory: Path) -> None:
        """Write this rank's weights, moments and step count below `directory`."""
        self.engine.save_checkpoint(str(directory), tag="engine", save_latest=False)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote at the same world size (verified by the caller)."""
        self.engine.load_checkpoint(str(directory), tag="engine", load_lr_scheduler_states=False)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights on the CPU of rank 0; None elsewhere. A collective."""
        keep = self.engine.global_rank == 0
        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    weights[name] = parameter.detach().cpu().clone()
        return weights if keep else None

    def close(self) -> None:
        """Give the memory back before the next stage."""
        self.engine.destroy()
        del self.engine
        _empty_caches()


class FrozenLM:
    """A causal LM that is only read: partitioned under ZeRO-3, no optimizer, no weight gradient.

    Args:
        settings: from `engine_settings`.
        recompute: the model recomputes activations (gradient checkpointing).
    """

    def __init__(self, model: torch.nn.Module, settings: dict, recompute: bool):
        model.requires_grad_(False)
        self.engine, *_ = deepspeed.initialize(model=model, config=settings)
        module = self.engine.module
        self.backbone = module.base_model
        self.dtype = next(module.parameters()).dtype
        # Recomputation needs training mode; otherwise evaluation mode keeps dropout off.
        module.train(recompute)

    def hidden(self, embeds_BTD: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, T, D) of a batch of input embeddings."""
        inputs = embeds_BTD.to(self.dtype)
        return self.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def close(self) -> None:
        """Give the memory back before the next stage."""
        self.engine.destroy()
        del self.engine, self.backbone
        _empty_caches()


def _quiet() -> None:
    """Keep the libraries' progress bars and notices to developers off the terminal."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*_all_gather_base.*|.*_reduce_scatter_base.*")


def _empty_caches() -> None:
    gc.collect()
    get_accelerator().empty_cache()
