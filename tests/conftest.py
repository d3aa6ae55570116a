import torch

# The tests' tensors are small: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # What waits for other processes begins first, so that the rest is done meanwhile.
    items.sort(key=lambda item: item.path.name != "test_faults.py")
