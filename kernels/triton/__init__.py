"""The Triton kernels, each file one idea: device code, its launcher and its own why_not(). Imported as
groupdpo_kernels.kernels; needs torch and triton alone.

There is deliberately no `__init__.py` one directory up: a package named `kernels` at the repository root would shadow
Hugging Face's `kernels`.
"""
