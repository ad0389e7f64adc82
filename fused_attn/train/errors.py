"""What the trainer raises for a user's mistake or a damaged file; the command line prints it on one line."""


class TrainError(RuntimeError):
    """A run that cannot start or go on: the text names the setting or the file, what was expected and what came."""
