"""A stand-in for the old package."""

from . import spaces


class Env:
    pass
