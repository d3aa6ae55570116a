import torch

# The tests' tensors are small: more threads only wait for each other.
torch.set_num_threads(1)
