"""Errors, one class for each kind of remedy."""

__all__ = ["ArgumentError", "BackdoorDefenseError", "DataError", "ModelError", "TrainerError"]


class BackdoorDefenseError(Exception):
    """Base of every error that this library raises on purpose."""


class ArgumentError(BackdoorDefenseError, ValueError):
    """An argument is out of range or contradicts another one: fix the call."""


class DataError(BackdoorDefenseError, ValueError):
    """The training data cannot be scanned or filtered: change the dataset or its loader."""


class TrainerError(BackdoorDefenseError, RuntimeError):
    """A Trainer setting rules the defence out: change the setting."""


class ModelError(BackdoorDefenseError, RuntimeError):
    """The model cannot be read: name what is missing (``forward_fn``, ``feature_layer``) or choose another method."""
