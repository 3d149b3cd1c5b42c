"""`python -m groupdpo_kernels.cli`: the console script, where none is installed."""

from . import main

main()
