"""The loop and the model families."""

GROUP = "qflux.trainers"  # of entry points: the trainers by name, this tree's and other packages'
