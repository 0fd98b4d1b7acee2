"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("char-gru", deadline=None)  # a slow machine is no failure
settings.load_profile("char-gru")
