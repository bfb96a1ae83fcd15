"""Checks of a run's model, data, translations and DeepSpeed JSON against each other.

They read headers and configs only, and run before anything is written.
"""

from transformers import PretrainedConfig

from s2t2_dist.config import Finetune, Pretrain, Translate
from s2t2_dist.data.shards import require_tokenizer, tokenizer_sha256
from s2t2_dist.errors import ArtifactError, ConfigError
from s2t2_dist.lm.folder import WeightFiles, local_folder, random_lm_config
from s2t2_dist.lm.translation import check_translation, load_translation
from s2t2_dist.lm.vocabulary import source_rows
from s2t2_dist.training.context import Context

# Config keys by which architectures change `hidden @ head.T` (Cohere, Granite, Falcon-H1, Gemma,
# RecurrentGemma, xLSTM), with the values that leave it as it is.
LOGIT_KEYS = {
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "output_logit_soft_cap": (None,),
}
FROZEN_ZERO_STAGES = (0, 3)


def check_inputs(context: Context) -> None:
    """Check everything that a run's stages read.

    Raises:
        ConfigError: no model folder, a model that a stage cannot use, or a vocabulary, context or
            ZeRO stage that does not fit.
        DataError: the data's tokenizer is not the one that a stage needs, or the model has none.
        ArtifactError: weights or a translation that are incomplete or altered.
    """
    recipe, data = context.recipe, context.train.metadata
    if recipe.model.config is not None:
        vocabulary = {"vocab_size": data["vocab_size"], **context.special_ids}
        _check_length(random_lm_config(recipe.model, vocabulary), context.train.context)
        return
    weights = WeightFiles(local_folder(recipe.model))
    weights.check()
    _check_length(weights.config, context.train.context)
    tokenizer_sha256(weights.folder)
    for stage in recipe.stages:
        assert not isinstance(stage, Pretrain), "a pretrain stage has no folder to start from"
        if isinstance(stage, Translate):
            _check_translate(stage, weights, context.deepspeed)
        else:
            _check_finetune(stage, weights, data)


def _check_length(config: PretrainedConfig, rows_of: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and rows_of > longest:
        raise ConfigError(
            f"the data's rows have {rows_of} tokens, but the model's max_position_embeddings is "
            f"{longest}; build the data with --context {longest} or less"
        )


def _check_translate(stage: Translate, weights: WeightFiles, deepspeed: dict) -> None:
    zero = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if zero not in FROZEN_ZERO_STAGES:
        raise ConfigError(
            f"deepspeed: zero_optimization.stage is {zero}, which cannot hold a frozen model; "
            f"stage {stage.name} needs 3 (or 0, a whole model on every rank)"
        )
    for key, neutral in LOGIT_KEYS.items():
        value = getattr(weights.config, key, None)
        if value not in neutral:
            raise ConfigError(
                f"stages.{stage.name}: the model's {key} is {value}, but a translation is learned "
                "through plain logits (hidden states times head); choose another model"
            )
    _check_vocabulary(stage.name, weights)
    source_rows(stage, weights)


def _check_finetune(stage: Finetune, weights: WeightFiles, data: dict) -> None:
    if stage.init == "source":
        require_tokenizer(data, weights.folder)
        return
    _check_vocabulary(stage.name, weights)
    if stage.init == "truncate" and data["vocab_size"] > weights.vocab_size:
        raise ConfigError(
            f"stages.{stage.name}.init: truncate keeps {data['vocab_size']} rows, but the "
            f"model has {weights.vocab_size}; take a smaller vocabulary"
        )
    if stage.init == "translation" and stage.translation is not None:
        check_translation(load_translation(stage.translation), weights.folder, data)


def _check_vocabulary(stage_name: str, weights: WeightFiles) -> None:
    """The embedding and the head can be read row by row, and are all that depends on tokens."""
    for name in (weights.embed_name, weights.head_name):
        if name not in weights.file_of:
            raise ArtifactError(
                f"{weights.folder} holds no {name}; load it with transformers and save it again"
            )
    if weights.head_bias:
        raise ConfigError(
            f"stages.{stage_name}: the model's LM head has a bias, one number per source token, "
            "which has no translation; choose another model"
        )
