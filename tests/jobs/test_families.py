"""Two stages through many architectures: exact from end to end, or refused in one true line."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from s2t2_dist.data.shards import ShardReader
from s2t2_dist.report.export import release
from tests.bench import models
from tests.conftest import SOURCE_VOCAB
from tests.jobs.launching import metrics, output, train, write_recipe
from tests.lm.families import make_model, tiny_config

# Float32 sums of some thousand nats in two orders; a wrong scale or a lost buffer is far above.
TOLERANCE = 1e-6
STAGE = {"max_steps": 2, "train_batch_size": 8, "per_device_train_batch_size": 8}
EXACT = """
    apertus bloom codegen cohere cohere2 deepseek_v3 falcon falcon_h1 gemma gemma2 gemma3
    gemma3_text glm4_moe gpt2 gpt_neo gpt_neox gpt_oss gptj granite lfm2 llama minicpm3
    mistral mixtral olmo olmo2 olmo3 opt phi phi3 qwen2 qwen3 qwen3_moe stablelm xglm
""".split()  # noqa: SIM905 - a list of 35 lines
# A scaled embedding and capped logits; a head with a bias; files that transformers converts, with a
# persistent buffer; a projected embedding. The others take minutes, and are run by hand.
CI = ("deepseek_v3", "gemma2", "opt", "phi")
TWO_RANKS = ("gemma2", "gpt2", "mixtral", "phi")


def soak_unless_ci(name):
    return () if name in CI else pytest.mark.soak


def run_family(tmp_path, tokenizer, shards, name, ranks, model=None):
    config = tiny_config(name, SOURCE_VOCAB)
    base = make_model(config, tokenizer, tmp_path / "base")
    stages = [
        {"kind": "translate", "learning_rate": 0.01, **STAGE},
        {"kind": "finetune", "learning_rate": 0.002, **STAGE},
    ]
    model = {"model_name_or_path": str(base), "dtype": "float32", **(model or {})}
    recipe = write_recipe(tmp_path / "job", base, shards, model=model, stages=stages)
    return recipe, train(recipe, ranks)


def evaluation_by_transformers(folder, shards):
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    reader = ShardReader(shards, "validation")
    nats = tokens = 0
    for row in range(len(reader)):
        ids = torch.tensor(reader[row][: reader.length(row)].astype("int64"))[None]
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = lm(ids).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    return nats / tokens


def assert_exact(folder, recipe, shards):
    """What the stages say of one another, and what transformers says of the exported folder."""
    lines = [line for line in metrics(folder / "job" / "run") if "eval_loss" in line]
    ends = {(line["stage"], line["step"]): line["eval_loss"] for line in lines}
    assert ends["finetune", 0] == pytest.approx(ends["translate", 2], abs=TOLERANCE)
    assert ends["translate", 0] != ends["translate", 2], "nothing was learned"
    release(folder / "job" / "run", folder / "exported")
    found = evaluation_by_transformers(folder / "exported", shards)
    assert found == pytest.approx(ends["finetune", 2], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=soak_unless_ci(n)) for n in EXACT])
def test_a_family_is_exact_from_end_to_end(tmp_path, source_tokenizer, protein_data, name):
    recipe, code = run_family(tmp_path, source_tokenizer, protein_data, name, 1)
    assert code == 0, output(recipe)[-3000:]
    assert_exact(tmp_path, recipe, protein_data)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=soak_unless_ci(n)) for n in TWO_RANKS])
def test_a_family_is_exact_on_two_ranks(tmp_path, source_tokenizer, protein_data, name):
    """Recomputing activations, which changes no number either."""
    recipe, code = run_family(
        tmp_path, source_tokenizer, protein_data, name, 2, model={"gradient_checkpointing": True}
    )
    assert code == 0, output(recipe)[-3000:]
    assert_exact(tmp_path, recipe, protein_data)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_page_on_models_holds_what_its_command_writes():
    """And so no architecture that transformers lists ends in a traceback, or is silently wrong."""
    found = models.outcomes(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert not [name for name, what in found.items() if what.startswith(("WRONG", "TRACEBACK"))]
    assert models.page(models.table(found)) == models.PAGE.read_text()
