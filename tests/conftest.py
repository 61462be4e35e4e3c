import os

import torch
from hypothesis import settings

# Triton decides when it is imported whether it interprets: on CPU tensors it must.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Shared machines stall; a slow example is not a wrong one.
settings.register_profile("banded", deadline=None)
settings.load_profile("banded")
