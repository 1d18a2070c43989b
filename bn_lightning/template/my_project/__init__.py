"""My project

Change the line above: it is the description in the output of --help.
"""
