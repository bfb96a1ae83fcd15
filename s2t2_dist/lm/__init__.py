"""Language models and translations of them: folders on disk, weights in partitions.

Read `folder` (a Hugging Face folder; E' and L' folded in), `vocabulary` (the rows of P and its
marginals), `translation` (P on disk), `load`, `engine` (DeepSpeed), `result` (the run's model/).
"""
