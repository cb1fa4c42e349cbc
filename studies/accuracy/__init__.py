"""What pruning costs in accuracy and saves in parameters, bytes and time, of the same models, on real tasks."""
