"""The one exception that users see as a sentence."""


class UserError(ValueError):
    """Wrong input: one sentence that names the file or key and the mend. The command line prints it and exits 2."""
