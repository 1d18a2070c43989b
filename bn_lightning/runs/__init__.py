"""One run: its settings, its folder, its records and its command line."""
