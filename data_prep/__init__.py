"""Turn FASTA or text into a tokenizer and Arrow shards: rows of token ids, all of one length.

Read the modules in this order:

1. `sources` cuts files into chunks, `readers` parses chunks into documents.
2. `trainers` and `tokenizer` train and load tokenizers.
3. `encode` and `bpe` turn documents into token ids.
4. `parts` and `packing` turn token ids into rows.
5. `steps` and `build` make all of this a job that many processes share; `workers` runs them.

`cli` holds the commands, `requests` records what a result is made from, `statistics` measures
tokenizers, and `release` checks a download. How to use them: `docs/data.md`.
"""
