"""What zeroing small gate gradients costs in accuracy, on real tasks (studies/tasks), and what it makes redundant.

`python -m studies.gate_gradients` has the commands run, table and plot.
"""
