"""The backward of an LSTM whose small gate gradients become zero, on a processor.

states.py          kernel: cell states, and whether gates are those that led to an output
step.py            kernel: one step back; and the time loop
sparse_lists.py    the numbers of a matrix that are not 0
sparse_products.py kernel: their products
products.py        products of gate gradients with matrices: with all numbers, or without zeros
dense_products.py  products with all numbers, by torch
through_time.py    the launcher
"""
