"""Doors into the trainers people use: one module or package a project, imported by nobody but the user.

Each imports its project when it is first needed, and refuses versions that it does not know.
"""
