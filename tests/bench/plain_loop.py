"""The same finetuning by a plain Hugging Face + DeepSpeed loop: the baseline of `tests.bench.gpu`.

`python -m tests.bench.plain_loop FOLDER DATA SETTINGS STEPS ROWS VOCABULARY` trains a model folder,
its vocabulary cut to the first VOCABULARY rows, on the rows of a data folder, in bf16 with AdamW
under a DeepSpeed JSON, and prints one line of JSON. As a user would write it: nothing of this
project.
"""

import json
import os
import sys
import time
from pathlib import Path

import deepspeed
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM


def rows_of(data: Path) -> np.ndarray:
    """Every training row's tokens (rows, T)."""
    shards = sorted((data / "train").glob("*.arrow"))
    tables = [pa.ipc.open_file(pa.memory_map(str(shard))).read_all() for shard in shards]
    tokens = pa.concat_tables(tables)["tokens"].combine_chunks()
    return tokens.flatten().to_numpy().reshape(len(tokens), -1)


def main(folder: str, data: str, settings: str, steps: str, rows: str, vocabulary: str) -> None:
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29511}.items():
        os.environ.setdefault(key, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU: minutes to compile
    deepspeed.init_distributed(verbose=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.resize_token_embeddings(int(vocabulary))
    optimizer = {"lr": 1e-4, "torch_adam": True, "adam_w_mode": True}
    config = json.loads(Path(settings).read_text()) | {
        "train_micro_batch_size_per_gpu": int(rows),
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "steps_per_print": 2**62,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    tokens, times, losses = rows_of(Path(data)), [], []
    for step in range(int(steps)):
        start = time.perf_counter()
        first = step * int(rows) % (len(tokens) - int(rows) + 1)
        batch = torch.from_numpy(tokens[first : first + int(rows)].astype(np.int64))
        batch = batch.to(engine.device)
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())  # waits for the device, as logging does
        times.append(time.perf_counter() - start)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    print(json.dumps({"seconds": times, "losses": losses, "peak_bytes": peak}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
