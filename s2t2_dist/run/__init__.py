"""Fault tolerance: run directory, checkpoints, metrics, detection of lost ranks, clean stops.

Read `directory`, `identity` (inputs.json), `checkpoint`, `reshard` (another number of ranks),
`metrics` (metrics.jsonl), `tracking` (MLflow), `link` (mlflow.json), `store`, `heartbeat`,
`stopping`, `output`, `progress`.
"""
