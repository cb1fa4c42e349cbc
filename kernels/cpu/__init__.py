"""Recurrent and linear layers on a processor, as vector code that numba compiles at first use.

support.py         what can run here; the only module that callers may import without numba
target.py          what the processor can do
vector_code.py     floats and indices as Python expressions that emit LLVM instructions
stored_weights.py  how the weights of a block are read as vectors, in each dtype
matrix.py          a matrix as kernels read it
block_products.py  rows of blocks times inputs
banks.py           inputs picked out of a bank, for each lane its own
picked_products.py rows of picked units times inputs
gate_sums.py       either of them, with scales and bias: what every kernel is made of
gates.py           tanh, sigmoid and the cells, on vectors
pack.py            kernel: inputs in the order in which products read them, quantised if asked for
products.py        kernel: many rows times a matrix
step.py            kernel: one time step of every cell
compilation.py     compiles kernels and keeps them
intrinsics.py      what numba functions do with addresses
multiply.py        rows times a matrix, packed first where they need it
layer.py           the time loop and the batch, the same for every cell
linear.py          any number of rows times a matrix
team.py            work shared by threads; threads.py has the threads
addresses.py       from tensors to the addresses that launchers give to kernels
recurrent_layer.py the launcher: a layer ready to run
linear_layer.py    the launcher of a linear layer

and, in gate_gradients/, the backward of an LSTM whose small gate gradients become zero.
"""
