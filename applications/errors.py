"""The error that an application shows to its user without a traceback."""


class UserError(Exception):
    """What happened, what it means and what to try: printed as it is, exit code 2."""
