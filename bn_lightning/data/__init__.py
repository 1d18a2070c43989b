"""Data sets: sources, checks of the files, preprocessing and augmentation."""
