"""Recurrent layers on a processor, as vector code that numba compiles at first use.

support.py         what can run here; the only module that callers may import without numba
vector_code.py     floats and indices as Python expressions that emit LLVM instructions
gates.py           tanh, sigmoid and the cells, on vectors
block_products.py  rows of blocks times inputs: what every kernel is made of
projection.py      the input projection of many rows
layer.py           scratch, the time loop and the batch, the same for every cell
intrinsics.py      what numba functions do with addresses
gru.py             the step of a GRU, and its launcher: a file like this for each cell
"""
