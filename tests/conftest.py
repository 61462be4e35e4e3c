from hypothesis import settings

# Shared machines stall; a slow example is not a wrong one.
settings.register_profile("banded", deadline=None)
settings.load_profile("banded")
