"""Memory of a process that decodes for long: whether it grows, and what a drafter takes."""


def main(console, tokens, out, about):
    """Not there yet."""
    raise NotImplementedError
