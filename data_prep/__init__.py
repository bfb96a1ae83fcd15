"""From FASTA or text to a tokenizer and to Arrow shards of fixed-length rows of token ids.

Read in this order: `sources` (files as chunks), `readers` (chunks as documents), `trainers` and
`tokenizer`, `encode` and `bpe` (documents as token ids), `parts` and `packing` (token ids as rows),
`steps` and `build` (all of it as jobs that many processes share), `workers`. Beside them: `cli`,
`requests`, `statistics` and `release`. `docs/data.md` says how to use it.
"""
