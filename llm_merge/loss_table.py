"""The table that weights come from: one loss per model and example row. Numbers and names only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llm_merge.recipe import Recipe

Measured = str | Recipe
"""A model's reference, or a merge."""


@dataclass(frozen=True)
class LossTable:
    """Losses in nats, lower is better.

    models          references in order; a merge is named by its YAML
    losses          [models][rows]
    rows_hash       of the rows, as `examples.rows_hash` gives it
    dates           for each model the day it was measured when that was not just now, else ""
    recorded        for each model: its losses came with the program
    other_base      the base that these were measured on is not the base as it is here
    format          one sentence: how the rows were written for the models
    notes           what the reader should know, one sentence each
    """

    models: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    rows_hash: str
    dates: tuple[str, ...] = ()
    recorded: tuple[bool, ...] = ()
    other_base: bool = False
    format: str = ""
    notes: tuple[str, ...] = ()

    def of(self, model: Measured) -> tuple[float, ...]:
        """The model's loss on each row. Raises KeyError for a model that is not in the table."""
        name = model_name(model)
        if name not in self.models:
            raise KeyError(name)
        return self.losses[self.models.index(name)]

    def mean(self, model: Measured) -> float:
        """Mean over the rows, in nats."""
        values = self.of(model)
        return math.fsum(values) / len(values)


def model_name(model: Measured) -> str:
    """A model's name in the table: its reference, or a merge's YAML."""
    return model.to_yaml() if isinstance(model, Recipe) else model
