"""Between the session and the weight-temperature widget: what it shows, and the next session after a choice in it."""

from __future__ import annotations

from typing import Any

from components.naming import short_name, without_demo_paths
from components.session import Session
from components.views.choice import Choice, WidgetRow, widget_value
from llm_merge.errors import RecipeError


def widget_of(session: Session) -> dict[str, Any]:
    """The widget's value: one row per model, the base among them even while it is left out."""
    table = session.losses if session.losses is not None and session.losses.rows_hash == session.measured_hash else None
    rows = [
        WidgetRow(
            name=short_name(model),
            title=without_demo_paths(model),
            loss=table.mean(model) if table is not None and model in table.models else None,
            base=model == session.base,
        )
        for model in session.models
    ]
    mixed = dict(zip(session.mixed, session.shares, strict=True))
    locks = dict(zip(session.mixed, session.locked or (False,) * len(session.mixed), strict=True))
    choice = Choice(
        temperature=session.temperature,
        shares=tuple(mixed.get(model, 0.0) for model in session.models),
        by_hand=session.shares_from != "losses",
        locked=tuple(locks.get(model, False) for model in session.models),
        include_base=session.include_base,
    )
    unit = "nats per token" if session.model_type in ("decoder", "encoder-decoder") else "nats per query"
    return widget_value(rows, choice, unit=unit)


def apply_choice(session: Session, choice: Choice) -> Session:
    """The session after what somebody set in the widget. Raises RecipeError when it does not fit the models."""
    if choice.include_base != session.include_base:
        session = session.with_base_included(choice.include_base)
    if not choice.by_hand:
        return session.with_temperature(choice.temperature)
    if len(choice.shares) != len(session.models):
        raise RecipeError("The models have changed meanwhile: set the shares again.", field="weights")
    by_model = dict(zip(session.models, choice.shares, strict=True))
    locks = dict(zip(session.models, choice.locked or (False,) * len(session.models), strict=True))
    shares = [by_model[model] for model in session.mixed]
    return session.with_hand_shares(shares, [locks[model] for model in session.mixed])
