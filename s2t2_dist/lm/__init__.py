"""Language models and token translations: folders on disk, weights partitioned over ranks.

Read `folder` (a Hugging Face folder), `fold` (E' and L' in it), `vocabulary` (the rows of P and its
marginals), `translation` (P on disk), `init` (rows without training, from `subtokens`, `auxiliary`
or `alignment`), `load`, `engine` (DeepSpeed), `result` (the run's model/), `sizes` (weight counts
and bytes). Apart from these: `marginal` (a text over all its tokenizations) stands on `paths`,
`spellings` and `draw`.
"""
