"""Tom & Jerry in Real Life: translate cartoon frames into natural photographs.

One flat module per stage of the course; see the README for the map. Importing this package is
cheap on purpose: torch, diffusers, transformers and matplotlib are only imported by the modules
that use them.
"""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake the user can mend; its message is one line: what, where, how to mend it.

    The command line prints the message to stderr and exits with code 2, without a traceback.
    """
