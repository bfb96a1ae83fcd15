"""From FASTA or text to a tokenizer and to Arrow shards of fixed-length rows of token ids."""
