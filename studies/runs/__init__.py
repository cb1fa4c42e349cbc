"""What programs that train many models share: the file of finished runs, progress, means over seeds."""
