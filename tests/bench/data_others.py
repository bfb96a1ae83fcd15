"""Other libraries in the data benchmark: `tokenizers` alone, `datasets`, other BPE encoders.

As a program, it does the work of `s2t2 data build` with `datasets`:
`python -m tests.bench.data_others FASTA TOKENIZER CORES TARGET`.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.bench import measure

BATCH = 1000


def bare_seconds(tokenizer: Path, texts: list[str], batch: int) -> float:
    """Seconds of `encode_batch_fast` on all texts, with RAYON_NUM_THREADS threads.

    The encodings are dropped: nothing is converted, checked or written.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def encode() -> None:
        for i in range(0, len(texts), batch):
            backend.encode_batch_fast(texts[i : i + batch], add_special_tokens=False)

    backend.encode_batch_fast(texts[:batch], add_special_tokens=False)
    return measure.seconds(encode)


def with_datasets(source: Path, tokenizer: Path, cores: int, target: Path) -> None:
    """Make the same rows, in file order, with `datasets.map` and `save_to_disk`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer

    from tests.bench.data import CONTEXT, sequences

    disable_progress_bars()
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = backend.token_to_id("<eos>")

    def rows(batch):
        encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        flat = [i for encoding in encodings for i in [*encoding.ids, eos]]
        end = len(flat) - len(flat) % CONTEXT
        return {"tokens": [flat[i : i + CONTEXT] for i in range(0, end, CONTEXT)]}

    data = Dataset.from_generator(
        lambda: ({"text": text} for text in sequences(source)), cache_dir=f"{target}-cache"
    )
    mapped = data.map(rows, batched=True, batch_size=BATCH, remove_columns=["text"], num_proc=cores)
    mapped.save_to_disk(str(target))


def libraries(tokenizer: Path, texts: list[str]) -> dict[str, dict]:
    """BPE encoders on one thread: seconds for all texts, and the number of texts whose tokens
    differ from those of `tokenizers`. Libraries that are not installed are left out.
    """
    path = tokenizer / "tokenizer.json"
    makers = {"tokenizers": _tokenizers, "bpe.cpp": _ours, "tokie": _tokie, "tiktoken": _tiktoken}
    found, expected = {}, []
    for name, maker in makers.items():
        if name != "bpe.cpp" and importlib.util.find_spec(name) is None:
            continue
        encode, seconds, other = maker(path), 0.0, 0
        for i in range(0, len(texts), BATCH):
            batch, ids = texts[i : i + BATCH], []
            seconds += measure.seconds(lambda e=encode, b=batch, out=ids: out.extend(e(b)))
            rows = [np.asarray(row, np.uint16) for row in ids]
            if name == "tokenizers":
                expected += rows
            pairs = zip(rows, expected[i:], strict=False)
            other += sum(not np.array_equal(*pair) for pair in pairs)
        version = "" if name == "bpe.cpp" else importlib.metadata.version(name)
        found[name] = {"version": version, "seconds": seconds, "other_tokens": other}
    return found


Encode = Callable[[list[str]], Sequence]


def _tokenizers(path: Path) -> Encode:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))  # `encode` of one text runs on one thread
    return lambda batch: [backend.encode(text, add_special_tokens=False).ids for text in batch]


def _ours(path: Path) -> Encode:
    from tokenizers import Tokenizer

    from data_prep.bpe import plain_bpe

    fast = plain_bpe(Tokenizer.from_file(str(path)))

    def encode(batch: list[str]) -> list[np.ndarray]:
        tokens, lengths = fast.encode([text.encode() for text in batch], 0, np.uint16)
        ends = np.cumsum(lengths)
        return [tokens[end - n : end - 1] for end, n in zip(ends, lengths, strict=True)]

    return encode


def _tokie(path: Path) -> Encode:
    import tokie

    backend = tokie.Tokenizer.from_json(str(path))
    return lambda batch: [backend.encode(text, False).ids for text in batch]


def _tiktoken(path: Path) -> Encode:
    import tiktoken

    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    ranks = {bytes([byte]): len(vocabulary) + byte for byte in range(256)}
    ranks |= {t.encode(): i for t, i in vocabulary.items() if not t.startswith("<")}
    backend = tiktoken.Encoding(
        "protein", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    )
    return lambda batch: [backend.encode_to_numpy(text, disallowed_special=()) for text in batch]


if __name__ == "__main__":
    with_datasets(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
