"""Errors of our own. Wrong arguments raise ValueError or TypeError; a wrong call raises what torch.nn raises."""


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run here; the message says why and what can."""


class SparseFileError(ValueError):
    """A file is truncated, damaged, or not one that `save_sparse` wrote; nothing was loaded from it."""
