"""`python -m cctrain`."""

from cctrain.cli import main

main()
