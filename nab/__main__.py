"""The command, also as ``python -m nab``."""

import sys


def main() -> None:
    """Run it, or name the extra that it needs."""
    try:
        from nab.cli import main as command
    except ModuleNotFoundError as error:
        sys.exit(f"the command needs {error.name}: pip install 'not-a-bandit[cli]'")
    command()


if __name__ == "__main__":
    main()
