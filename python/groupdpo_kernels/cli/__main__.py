"""`python -m groupdpo_kernels.cli` runs the command line where the console script is not installed."""

from . import main

main()
