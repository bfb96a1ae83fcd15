"""Rows on disk as batches in memory, and what a model makes of them in bits per byte.

Read `shards` (the format of a data directory), `spelling`, `batches`, `order`,
`evaluate`.
"""

from s2t2_dist.data.shards import ShardReader

__all__ = ["ShardReader"]
