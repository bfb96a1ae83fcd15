"""Triton for a GPU: `dykstra` and `plan` are the kernels, `passes` sweeps the rows with them.

Importing this package imports no Triton: `library` says whether there is one; `passes` needs it.
"""
