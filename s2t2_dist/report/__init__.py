"""What is made of finished runs: exports, checks, tables, figures.

Read `runs` (a run as it lies on disk), then what you need: `export`, `card` and `verify`;
`compare` and `figure`; `translation` (the plan to look at); `evaluate`; `track` (MLflow, later).
"""
