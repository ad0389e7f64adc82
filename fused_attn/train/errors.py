"""What the trainer raises for a user's mistake or a damaged file; the command line prints it on one line."""


class TrainError(RuntimeError):
    """A run that cannot start or go on: the text names the setting or the file, what was expected and what came."""


class NonFiniteError(TrainError):
    """A loss, gradient or weight that is not finite: the text names the step."""


def reason(error: BaseException) -> str:
    """The text of another library's error on one line, at most 300 characters of it; its type if it has no text."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:300]} ...") or type(error).__name__
