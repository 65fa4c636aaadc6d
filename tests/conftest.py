import torch

# The tests' networks are tiny: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)
