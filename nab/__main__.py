"""``python -m nab``."""

from nab.cli import main

if __name__ == "__main__":
    main()
