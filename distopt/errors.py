"""Every error that a user of distopt can meet. Each message is one line: what was given, what is allowed."""


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


class RegistrationError(DistoptError, RuntimeError):
    """A reducer cannot be registered on what it was given."""


class StateError(DistoptError, ValueError):
    """A saved state does not belong to this registration, or is damaged."""
