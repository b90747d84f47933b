"""The errors that a user can act on: each message is one line and says what to do."""


def one_line(error: BaseException) -> str:
    """What another library's exception says, in one line of bounded length for a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class FewfireError(Exception):
    """Anything that goes wrong at run time (a file, the network, memory); the CLI exits with 1."""


class SourceError(FewfireError):
    """A model cannot be found, fetched or verified."""


class CheckpointError(FewfireError):
    """A checkpoint or packed model is damaged, incomplete or of an unsupported architecture."""


class ContextFullError(FewfireError):
    """The prompt or the conversation does not fit the model's context."""
