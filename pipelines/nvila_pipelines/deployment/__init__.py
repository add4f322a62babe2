"""Deploying registered models: from an alias in the registry to an endpoint on a cluster, and back."""
