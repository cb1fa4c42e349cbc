"""Back-propagation through an LSTM or GRU in which small gradients of the linear gates become exactly zero.

`contract.py` says what goes in and out; `reference.py`, `cpu.py` and `triton.py` are twins of each other; `dispatch.py`
chooses among them; `function.py` makes it autograd's.
"""
