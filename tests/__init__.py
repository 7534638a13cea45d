"""The tests. A package, so that `tests.tiny_models` can be imported from anywhere in the repository."""
