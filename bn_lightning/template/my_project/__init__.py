"""My project

The first line is the description in `python -m my_project --help`. Change it here.
"""
