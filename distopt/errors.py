"""Every error that a user of distopt can meet. Each message is one line: what was given, what is allowed."""

from collections.abc import Sequence


class DistoptError(Exception):
    """The base of all errors that distopt raises on purpose."""


class SettingError(DistoptError, ValueError):
    """A setting has a value that is not allowed.

    Args:
        field: the setting's name as the user wrote it, ``PowerSGD.rank`` for example.
        value: what was given.
        allowed: what would have been accepted, in words.

    Example:
        >>> print(SettingError("PowerSGD.rank", 0, "an integer of at least 1"))
        PowerSGD.rank is 0, but must be an integer of at least 1
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}, but must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class MissingPackageError(DistoptError, ImportError):
    """A package that only this needs is not installed.

    Args:
        package: its name.
        extra: of distopt, which brings it.

    Example:
        >>> print(MissingPackageError("matplotlib", "report"))
        matplotlib is missing: pip install 'distopt[report]'
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is missing: pip install 'distopt[{extra}]'")


class RegistrationError(DistoptError, RuntimeError):
    """A reducer cannot be registered on what it was given."""


class StateError(DistoptError, ValueError):
    """A saved state does not belong to this registration, or is damaged."""


class CheckpointError(DistoptError, RuntimeError):
    """A checkpoint cannot be written, or is damaged, or does not hold what is asked for."""


class AgreementError(DistoptError, RuntimeError):
    """The ranks do not do the same thing: other parameters, settings, order, or number of forward passes.

    Args:
        message: one line that says which ranks differ, and in what.
        ranks: the global ranks that differ from most others; all of those concerned where there is no majority.

    Example:
        >>> AgreementError("rank 1 has no parameter 'head.bias'", [1]).ranks
        (1,)
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class PeerLostError(DistoptError, RuntimeError):
    """A collective cannot complete, because a rank died, stopped, or is somewhere else.

    Args:
        message: one line that names the ranks to blame, and where it showed.
        ranks: the global ranks to blame; empty if that could not be found out.

    Example:
        >>> PeerLostError("rank 2 is gone", [2]).ranks
        (2,)
    """

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class ScaleError(DistoptError, RuntimeError):
    """A gradient scale cannot become low enough: a branch's gradients overflow in every step."""


class WindowError(DistoptError, RuntimeError):
    """A window of micro-batches is not gone through as `distopt.accumulate` needs it."""
