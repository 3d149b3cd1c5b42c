"""Patches of other projects' trainers, so that they run on this package: one module for each project, for users alone.

Each module imports its project when it is first needed, and refuses versions that it does not know.
"""
