"""Two stages through many architectures: exact from end to end, or refused in one true line."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2t2_dist.data.shards import ShardReader
from s2t2_dist.report.export import release
from tests.conftest import SOURCE_VOCAB
from tests.jobs.launching import metrics, output, train, write_recipe
from tests.lm.families import make_model, tiny_config

# Float32 sums of some thousand nats in two orders; a wrong scale or a lost buffer is far above.
TOLERANCE = 1e-6
STAGE = {"max_steps": 2, "train_batch_size": 8, "per_device_train_batch_size": 8}
EXACT = (
    *("apertus", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "falcon", "falcon_h1"),
    *("gemma", "gemma2", "gemma3_text", "glm4_moe", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss"),
    *("gptj", "granite", "lfm2", "llama", "minicpm3", "mistral", "mixtral", "olmo", "olmo2"),
    *("olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "xglm"),
)


def run_family(tmp_path, tokenizer, shards, name, ranks, **changes):
    config = tiny_config(name, SOURCE_VOCAB, **changes)
    base = make_model(config, tokenizer, tmp_path / "base")
    stages = [
        {"kind": "translate", "learning_rate": 0.01, **STAGE},
        {"kind": "finetune", "learning_rate": 0.002, **STAGE},
    ]
    model = {"model_name_or_path": str(base), "dtype": "float32"}
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


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_exact_from_end_to_end(tmp_path, source_tokenizer, protein_data, name):
    recipe, code = run_family(tmp_path, source_tokenizer, protein_data, name, 1)
    assert code == 0, output(recipe)[-3000:]
    run = tmp_path / "job" / "run"
    lines = metrics(run)
    ends = {
        (line["stage"], line["step"]): line["eval_loss"] for line in lines if "eval_loss" in line
    }
    folded = ends["finetune", 0]
    assert folded == pytest.approx(ends["translate", 2], abs=TOLERANCE)
    assert ends["translate", 0] != ends["translate", 2] and math.isfinite(folded)
    release(run, tmp_path / "exported")
    found = evaluation_by_transformers(tmp_path / "exported", protein_data)
    assert found == pytest.approx(ends["finetune", 2], abs=TOLERANCE)
