"""`python -m parallama` is the `parallama` command."""

from parallama.cli import main

main()
