"""What one visitor has chosen and measured so far: the one value behind the page.

A frozen value of references, rows, losses and shares; never tensors, never components. Every handler takes a session
and returns the next one; every tab draws itself from it. Which results still belong to the current inputs is decided
here, by comparing keys, so that nothing stale is ever shown as if it were current.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llm_merge.recipe import Recipe
from llm_merge.weights import softmax_weights

if TYPE_CHECKING:
    from llm_merge.measurements import LossTable

Row = Mapping[str, Any]
DEFAULT_TEMPERATURE = 5.0  # LM-Cocktail's


@dataclass(frozen=True)
class Session:
    """One visitor's work.

    base, fine_tunes    references as `llm_merge.checkpoint.open_checkpoint` reads them; "" means not chosen yet
    include_base        the base takes a share of the mix too
    rows                all example rows, normalised, each with its "task"; from 20 of the visitor's own rows up, a part
                        is held out for the scoreboard and never measured for shares (`measured_rows` has the others)
    rows_from           where they come from, as a person would say it: "Verse + Dictionary (demo)"
    demo_tasks          the demo tasks the rows are, () for the visitor's own rows
    losses              measured losses, of these rows or of earlier ones (see `table`)
    by_hand             shares set by hand in the order of `mixed`, or () for softmax(-loss / temperature)
    owners              (task, fine-tune) as the visitor said on Layers; the others are guessed
    layered             a recipe made on Layers in the place of the shares, and in words where it comes from
    saved               (recipe's YAML, folder) of the last merge written, ("", "") for none
    """

    model_type: str = "decoder"
    base: str = ""
    fine_tunes: tuple[str, ...] = ()
    include_base: bool = False
    rows: tuple[Row, ...] = field(default=(), hash=False)  # dicts; `rows_hash` stands for them
    rows_from: str = ""
    demo_tasks: tuple[str, ...] = ()
    rows_hash: str = ""
    measured_rows: tuple[Row, ...] = field(default=(), hash=False)  # those that decide the shares; the rest is held out
    measured_hash: str = ""
    losses: LossTable | None = field(default=None, repr=False)
    temperature: float = DEFAULT_TEMPERATURE
    by_hand: tuple[float, ...] = ()
    locked: tuple[bool, ...] = ()
    owners: tuple[tuple[str, str], ...] = ()
    layered: Recipe | None = None
    layered_from: str = ""
    dtype: str | None = None
    tried: str = ""  # YAML of the last recipe that was tried
    saved: tuple[str, str] = ("", "")

    @property
    def models(self) -> tuple[str, ...]:
        """The base first, then the fine-tunes; empty fields left out, the same model never twice."""
        return tuple(dict.fromkeys(model for model in (self.base, *self.fine_tunes) if model))

    @property
    def mixed(self) -> tuple[str, ...]:
        """The models that take a share."""
        return self.models if self.include_base else tuple(model for model in self.models if model != self.base)

    @property
    def table(self) -> LossTable | None:
        """The losses, if they were measured on these rows and cover every mixed model; else None."""
        table = self.losses
        if table is None or not self.rows or table.rows_hash != self.measured_hash:
            return None
        return table if all(model in table.models for model in self.mixed) else None

    @property
    def mean_losses(self) -> tuple[float, ...] | None:
        """Mean loss of each mixed model, or None when not all are measured."""
        table = self.table
        if table is None or not self.mixed:
            return None
        return tuple(table.mean(model) for model in self.mixed)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each mixed model; equal ones while nothing is measured."""
        count = len(self.mixed)
        if count == 0:
            return ()
        if len(self.by_hand) == count:
            return self.by_hand
        losses = self.mean_losses
        return tuple([1 / count] * count) if losses is None else softmax_weights(losses, self.temperature)

    @property
    def origin(self) -> str:
        """Where the merge comes from: "layers", or for shares "hand" | "losses" | "equal"."""
        return "layers" if self.layered is not None else self.shares_from

    @property
    def shares_from(self) -> str:
        """Where the shares come from, also while a recipe made on Layers takes their place."""
        if len(self.by_hand) == len(self.mixed) > 0:
            return "hand"
        return "equal" if self.mean_losses is None else "losses"

    @property
    def recipe(self) -> Recipe | None:
        """The merge as it stands, or None while there is nothing to mix."""
        if not self.mixed:
            return None
        if self.layered is not None:
            return self.layered.with_dtype(self.dtype)
        recipe = Recipe.linear(self.mixed, self.shares, dtype=self.dtype)
        return replace(recipe, base_model=self.base or None)  # config and tokenizer are the base's, as in Try

    @property
    def recipe_key(self) -> str:
        """Equal keys: the same merge. What a result names as the recipe it was made with."""
        recipe = self.recipe
        return recipe.to_yaml() if recipe else ""

    @property
    def saved_folder(self) -> str:
        """Where the current recipe was written, "" if it was not."""
        key, folder = self.saved
        return folder if key and key == self.recipe_key else ""

    def with_models(self, model_type: str, base: str, fine_tunes: Sequence[str]) -> Session:
        """Other models: hand-set shares no longer fit; rows of another type's shape go as well."""
        chosen = tuple(model for model in fine_tunes if model)
        changed = replace(self, model_type=model_type, base=base, fine_tunes=chosen)
        if changed.mixed != self.mixed:
            changed = replace(changed, by_hand=(), locked=())
        if changed.models != self.models or changed.base != self.base:
            changed = replace(changed, layered=None, layered_from="", owners=())
        if row_shape(model_type) != row_shape(self.model_type):
            changed = changed.with_rows((), "", ())
        return changed

    def with_rows(self, rows: Sequence[Row], rows_from: str, demo_tasks: Sequence[str]) -> Session:
        """Other rows. A demo set has held-out rows of its own, so all of it is measured."""
        from llm_merge.examples import rows_hash, split

        kept = tuple(rows)
        measured = kept if demo_tasks else split(kept).work
        return replace(
            self,
            rows=kept,
            rows_from=rows_from,
            demo_tasks=tuple(demo_tasks),
            rows_hash=rows_hash(kept) if kept else "",
            measured_rows=measured,
            measured_hash=rows_hash(measured) if measured else "",
        )

    def with_losses(self, table: LossTable | None) -> Session:
        return replace(self, losses=table)

    def with_base_included(self, include: bool) -> Session:
        return replace(self, include_base=include, by_hand=(), locked=(), layered=None, layered_from="")

    def with_temperature(self, temperature: float) -> Session:
        """Shares from the losses at this temperature; shares set by hand are given up."""
        softmax_weights([0.0], temperature)  # the core says what is wrong with it
        return replace(self, temperature=float(temperature), by_hand=(), locked=(), layered=None, layered_from="")

    def with_hand_shares(self, shares: Sequence[float], locked: Sequence[bool] = ()) -> Session:
        """Shares of the mixed models set by hand. Raises RecipeError unless they are finite and sum to 1."""
        Recipe.linear(self.mixed, shares)
        total = math.fsum(shares)
        by_hand = tuple(share / total for share in shares)
        return replace(self, by_hand=by_hand, locked=tuple(locked), layered=None, layered_from="")

    def with_layered(self, recipe: Recipe | None, origin: str = "") -> Session:
        """A recipe made on Layers in the place of the shares; None goes back to them."""
        return replace(self, layered=recipe, layered_from=origin if recipe is not None else "")


def row_shape(model_type: str) -> str:
    """Which columns a model type's rows have: "answer" (input, output) or "search" (query, pos, neg)."""
    return "answer" if model_type in ("decoder", "encoder-decoder") else "search"
