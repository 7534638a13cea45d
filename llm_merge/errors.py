"""Everything that can be wrong with what a person gave us, each in one clear sentence.

    MergeError                  base class; `field` says which input it belongs to
    ├── RecipeError             weights, temperature, method, YAML; `field` is the path inside the recipe
    ├── CheckpointError         a model that cannot be opened or read; `field` is its reference
    ├── IncompatibleModels      models that cannot be merged; `problems` lists all of them
    ├── ExampleError            example rows; `problems` lists them with line numbers
    └── OutputError             the folder to write to
    Stopped                     not an error of the user's: the work was asked to stop

A message says what is wrong, where, and what to do; callers show it as it is. Bugs are not MergeErrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MergeError(Exception):
    """Something in the input that its author can put right."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class RecipeError(MergeError):
    """A recipe, a weight or a temperature that cannot be used; `field` is its path: ``models[1].parameters.weight``."""


class CheckpointError(MergeError):
    """A model that cannot be opened or read; `field` is its reference."""


class OutputError(MergeError):
    """A place that cannot be written to."""


@dataclass(frozen=True)
class Problem:
    """One thing found while planning: a `problem` forbids the merge, a `warning` does not."""

    severity: str  # "problem" | "warning"
    model: str  # reference of the model that causes it, "" for all
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.fix}".strip()


class IncompatibleModels(MergeError):
    """Models that cannot be merged. Everything wrong is collected before complaining."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems), field="models")
        self.problems = tuple(problems)


class ExampleError(MergeError):
    """Example rows that cannot be used; `problems` has one sentence per row, with its line or row number."""

    def __init__(self, problems: Sequence[str], *, field: str = "examples") -> None:
        super().__init__("\n".join(problems), field=field)
        self.problems = tuple(problems)


class Stopped(Exception):
    """The work was asked to stop before it was done."""
