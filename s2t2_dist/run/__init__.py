"""Fault tolerance: run directory, checkpoints, metrics, detection of lost ranks, clean stops.

Read `directory`, `checkpoint`, `reshard` (another number of ranks), `tracking` (metrics.jsonl and
MLflow), `heartbeat`, `stopping`, `progress`.
"""
