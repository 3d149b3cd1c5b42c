"""The numerics campaign: thousands of drawn cases, each held to its error budget against float64.

`frame.py` has what a family of cases is, and runs one; every other file is a family. tests/numerics.py is the command,
tests/test_numerics.py the slice that every test run takes.
"""
