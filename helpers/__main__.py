"""`python -m helpers`: see helpers/cli.py."""

from helpers.cli import main

main()
