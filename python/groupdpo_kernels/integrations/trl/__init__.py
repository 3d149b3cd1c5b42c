"""TRL. Importing this does not import TRL."""

from .accelerate import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
