import os

from bn_lightning.cli import main

main(os.environ["BROKEN_EXPERIMENT"])
