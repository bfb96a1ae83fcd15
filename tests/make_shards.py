"""A small sealed data directory from lists of token ids, without a tokenizer."""

import numpy as np

from data_prep.packing import RowWriter
from s2t2_dist import artifacts
from s2t2_dist.shards import TOKEN_BYTES, shard_schema, token_dtype

PAD = 1


def make_data(target, documents, context, vocab_size=300):
    """A sealed data directory with the same documents in both splits."""
    record = {"kind": "data", "context": context, "vocab_size": vocab_size, "splits": {}}
    with artifacts.sealed_directory(target, record) as directory:
        for split in ("train", "validation"):
            schema = shard_schema(context, vocab_size, {})
            with RowWriter(directory / split, schema, PAD) as writer:
                for document in documents:
                    writer.add(np.asarray(document, token_dtype(vocab_size)))
            rows = sum(shard["rows"] for shard in writer.shards)
            record["splits"][split] = {"rows": rows, "shards": writer.shards}
        np.save(directory / TOKEN_BYTES, np.arange(vocab_size))
    return target
