"""The error for what the inspector cannot start with, or go on with."""


class InspectError(ValueError):
    """A model, a source or an argument of no use; the message is one line that names it and says what to do.

    A frame that cannot be read is no such error: it becomes a result that says why.
    """
