"""What all tests share."""

import torch

# Small tensors: more threads only wait for each other, most of all where several test runs share a machine.
torch.set_num_threads(1)
