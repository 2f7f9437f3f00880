"""Fused operations: tensor functions that a GPU would otherwise make of dozens of launches.

Each lives in a folder of its own. `reference.py` defines the result in plain PyTorch, roundings and orders of
summation included: it is the path on a CPU and the fallback everywhere. `kernels.py` holds Triton kernels that give
the same result. `__init__.py` registers the operations and is all that others import. `dispatch.py` chooses.
"""
