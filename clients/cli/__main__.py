"""`python -m clients.cli`: the same as `hotswap`."""

from clients.cli.main import main

main()
