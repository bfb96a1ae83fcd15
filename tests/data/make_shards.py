"""A small sealed data directory from lists of token ids, without a tokenizer."""

import numpy as np

from data_prep.packing import Packed, write_shard
from s2t2_dist import artifacts
from s2t2_dist.data.shards import ROWS_PER_SHARD, TOKEN_BYTES, shard_schema, token_dtype

PAD = 1


def make_data(target, documents, context, vocab_size=300):
    """A sealed data directory with the same documents in both splits."""
    record = {"kind": "data", "context": context, "vocab_size": vocab_size, "splits": {}}
    with artifacts.sealed_directory(target, record) as directory:
        for split in ("train", "validation"):
            (directory / split).mkdir()
            shards = list(_write_shards(directory, split, documents, context, vocab_size))
            rows = sum(shard["rows"] for shard in shards)
            record["splits"][split] = {"rows": rows, "shards": shards}
        np.save(directory / TOKEN_BYTES, np.arange(vocab_size))
    return target


def _write_shards(directory, split, documents, context, vocab_size):
    """The documents end to end; yields what the manifest says of each shard."""
    arrays = [np.asarray(document, token_dtype(vocab_size)) for document in documents]
    tokens = np.concatenate(arrays)
    starts = np.cumsum([0, *map(len, arrays)])[:-1]
    size = ROWS_PER_SHARD * context
    for number, first in enumerate(range(0, len(tokens), size)):
        part = tokens[first : first + size]
        inside = starts[(starts >= first) & (starts < first + size)] - first
        name = f"{split}/shard-{number:05d}.arrow"
        schema = shard_schema(context, vocab_size, {})
        write_shard(directory / name, schema, [Packed(part, inside, None)], PAD)
        yield {"file": name, "rows": -(-len(part) // context)}
