"""The one exception for what a user gave and can mend."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and the way out.

    The command-line entry points print the message alone (no traceback) and exit with status 1.
    """


def nearest(name: str, allowed: "list[str] | set[str]") -> str:
    """`" (did you mean 'x'?)"` for the closest allowed name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
