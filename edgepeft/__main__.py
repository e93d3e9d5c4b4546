"""``python -m edgepeft``: the same as the ``edgepeft`` command."""

from edgepeft.cli import main

main()
