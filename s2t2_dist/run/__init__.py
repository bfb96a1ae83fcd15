"""What lets a job survive: its directory, checkpoints, metrics, and the watch over its ranks.

Read `directory`, `checkpoint`, `reshard` (another number of ranks), `tracking` (metrics.jsonl and
MLflow), `heartbeat`, `stopping`, `progress`.
"""
