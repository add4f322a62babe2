"""What a model scores and costs at every way to look at media and to keep weights: points, costs, the front."""
