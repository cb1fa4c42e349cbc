"""Back-propagation through an LSTM or GRU in which small gradients of the linear gates become exactly zero.

`options.py` is what a user says, `controller.py` what a layer holds and changes, `layer.py` the layer. `contract.py`
says what goes in and out of a backward; the modules of `backends/` are twins of each other, and `dispatch.py` chooses
among them; `function.py` makes it autograd's.
"""
