"""What all tests share: generated examples may take any time, as their machine may be busy."""

from hypothesis import settings

settings.register_profile("gimbal", deadline=None)
settings.load_profile("gimbal")
