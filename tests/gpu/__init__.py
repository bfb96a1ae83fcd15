"""What must hold on a GPU: run `python -m pytest tests/gpu` on a machine with one (docs/gpu.md).

Every test also runs without a GPU, smaller, on the CPU: so none of them is first run on the card.
"""
