"""What a user can mend: exceptions whose message is one line, which the command prints, and whose attributes say what
it is about. Nothing decides on the text of one of them."""


class OneLineError(Exception):
    """An exception whose message stays one line.

    A worker of a loader passes its traceback on as the message, and makes the exception anew from it: what is kept is
    the line of the message.
    """

    def __init__(self, message: str):
        last = (message.strip().splitlines() or [""])[-1]
        super().__init__(last.partition(f"{type(self).__name__}: ")[2] or message)


class UserError(OneLineError, ValueError):
    """The base of them all."""


class RecipeError(UserError):
    """A recipe, a section or a key that does not exist, or a value that it cannot have.

    Attributes:
        key: such as `data.dataset`; "" where it is about the whole.
    """

    def __init__(self, message: str, key: str = ""):
        super().__init__(message)
        self.key = key


class DataError(UserError):
    """Images, labels or masks that cannot be used as they are.

    Attributes:
        place: the file, folder, URL or column it is about; "" where there is no one place.
    """

    def __init__(self, message: str, place: str = ""):
        super().__init__(message)
        self.place = place


class CheckpointError(UserError):
    """A model that is not there, is damaged, or does not fit.

    Attributes:
        source: the file, folder, URL or id on the Hub.
    """

    def __init__(self, message: str, source: str = ""):
        super().__init__(message)
        self.source = source


class EvaluationError(UserError):
    """A model was trained and saved, and its evaluation failed.

    Attributes:
        folder: of the run.
    """

    def __init__(self, message: str, folder: str = ""):
        super().__init__(message)
        self.folder = folder


class FolderError(UserError):
    """An output folder that cannot be used.

    Attributes:
        folder: its path or URL.
    """

    def __init__(self, message: str, folder: str = ""):
        super().__init__(message)
        self.folder = folder
