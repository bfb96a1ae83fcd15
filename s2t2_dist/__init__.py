"""Sparse Sinkhorn Token Translation as a distributed training system."""
