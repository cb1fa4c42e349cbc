"""What zeroing small gate gradients costs in accuracy, on real tasks (bench/tasks), and what it makes redundant.

`python -m bench.gate_gradients` has the commands run, table and plot.
"""
