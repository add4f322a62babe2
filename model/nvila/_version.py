"""The version, in one place: the build reads this file, the packages import it."""

__version__ = "0.1.0"
