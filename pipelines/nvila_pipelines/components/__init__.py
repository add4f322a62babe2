"""Kubeflow components, one a file: a typed signature and one call into the installed package."""
