"""`python -m fewfire_cli`, the same as `fewfire`."""

from fewfire_cli.main import main

main()
