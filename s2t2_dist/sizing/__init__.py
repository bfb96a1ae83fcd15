"""`s2t2 plan`: what a recipe needs in memory, traffic and disk, by arithmetic.

Read `stages` (one stage under one DeepSpeed JSON), `dryrun` (activations), `report`.
"""
