"""Files that the commands read and write: a recipe in, small results out, each written aside and renamed when whole."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path

from llm_merge import demo
from llm_merge.commands.console import Console
from llm_merge.errors import OutputError, RecipeError
from llm_merge.recipe import Recipe


def read_recipe(path: str) -> Recipe:
    """mergekit's YAML. Raises RecipeError for a file that cannot be read, or what is wrong in it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise RecipeError(f"The recipe {path} cannot be read ({reason}): check its name.", field="recipe") from error
    return Recipe.from_yaml(text)


def resolve_model(reference: str, console: Console) -> str:
    """The reference; of a demo model's key ("king-james") the reference that opens it, its base made ready first."""
    if reference not in {model.key for model in demo.DEMO_MODELS} or Path(reference).exists():
        return reference
    for words, share in () if demo.is_prepared(reference) else demo.prepare(reference):
        console.progress("prepare", words, round(100 * share), 100)
    return demo.demo_path(reference)


def with_demo_models(recipe: Recipe, console: Console) -> Recipe:
    """The recipe with every model resolved as `resolve_model` does."""
    base = None if recipe.base_model is None else resolve_model(recipe.base_model, console)
    models = tuple(replace(entry, model=resolve_model(entry.model, console)) for entry in recipe.models)
    return replace(recipe, models=models, base_model=base)


def check_file(path: str | None, option: str) -> None:
    """Raise OutputError, before any work, unless a file can be written there. None is not to be written."""
    if path is None:
        return
    target = Path(path).expanduser()
    try:
        if not path.strip() or target.is_dir():
            raise OutputError(f"{option} “{path}” is a folder: give the name of a file.", field=option)
        if not target.absolute().parent.is_dir():
            raise OutputError(f"{option}: the folder of {path} does not exist: make it first.", field=option)
    except (OSError, ValueError) as error:
        raise OutputError(f"{option} “{path[:200]}” cannot be a file's name: write it again.", field=option) from error
    if not os.access(target.absolute().parent, os.W_OK):
        raise OutputError(f"{option}: the folder of {path} cannot be written to: choose another one.", field=option)


def write_file(path: str | None, text: str, option: str) -> None:
    """The text, all of it or nothing. Raises OutputError."""
    if path is None:
        return
    target = Path(path).expanduser()
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{option}: writing {path} failed ({reason}): choose another place.", field=option) from error
    finally:
        aside.unlink(missing_ok=True)
