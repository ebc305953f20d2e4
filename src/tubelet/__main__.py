"""`python -m tubelet` is `tubelet`."""

from tubelet.cli import main

main()
