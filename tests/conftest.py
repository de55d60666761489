"""What holds for all tests."""

import torch

# Everything here is tiny: a second thread would only wait for the first, and spin while other processes need the core.
torch.set_num_threads(1)
