"""KFP components, one a file: a typed signature whose body runs one step of the installed package."""
