from bn_lightning.cli import main

main("friedman.experiment:EXPERIMENT")
