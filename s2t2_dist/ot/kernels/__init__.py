"""Triton for a GPU: `dykstra`, `dual` and `plan` are kernels, `passes` sweeps the rows with them.

Importing this package imports no Triton: `library` says whether there is one; `passes` needs it.
"""
