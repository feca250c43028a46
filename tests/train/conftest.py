import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and tests run side by side

settings.register_profile("unhurried", deadline=None)  # first calls import and compile
settings.load_profile("unhurried")
