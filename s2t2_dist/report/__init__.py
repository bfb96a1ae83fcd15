"""Output of finished runs: exported models, verification, comparison tables and figures.

Read `runs` (reads a run directory), then what you need: `export`, `card` and `verify`; `compare`
and `figure`; `translation` (inspects a plan); `evaluate` and `marginal`; `track` (sends metrics to
MLflow later).
"""
