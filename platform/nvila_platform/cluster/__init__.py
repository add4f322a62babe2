"""Manifests of cluster resources, as pure functions of typed values."""
