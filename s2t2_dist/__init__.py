"""Sparse Sinkhorn Token Translation (S2T2) as a distributed training system."""

__all__ = ["load_translation"]


def __getattr__(name: str) -> object:
    """Import `load_translation` on first use, because data preparation does not need torch."""
    if name == "load_translation":
        from s2t2_dist.lm.translation import load_translation

        return load_translation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
