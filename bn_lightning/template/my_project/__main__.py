"""Run the commands of this project. There is nothing to change here."""

from bn_lightning.cli import main

main("my_project.experiment:EXPERIMENT")
