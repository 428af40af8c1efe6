"""``python -m nab``."""

from nab.cli import main

main()
