"""Where the tests of Triton kernels put their tensors: on a GPU, or on the CPU for the interpreter of Triton."""

import torch

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
