"""One thread a test process: the networks here are small, and xdist runs one process a core."""

import torch

torch.set_num_threads(1)
