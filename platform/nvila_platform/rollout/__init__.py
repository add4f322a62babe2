"""Rolling a revision out on a cluster: weights of traffic, what decides about the next one, and where it stands."""
