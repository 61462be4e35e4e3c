import os

from hypothesis import settings

# Triton decides when it is imported whether it interprets, as it must on CPU tensors. `make gpu-check` says 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Half a minute of compiling for each shape of heads: the tests of the compiled ops ask for it.
os.environ.setdefault("BANDED_COMPILE", "0")

# Shared machines stall; a slow example is not a wrong one.
settings.register_profile("banded", deadline=None)
settings.load_profile("banded")
