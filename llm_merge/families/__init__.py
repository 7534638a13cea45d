"""The kinds of models there are: how each is built empty, reads examples, is measured and is saved.

A new kind of model is one more `Family` in a file of its own and a line here.
"""

from __future__ import annotations

from llm_merge.errors import RecipeError
from llm_merge.families.base import Family
from llm_merge.families.decoder import Decoder
from llm_merge.families.encoder import Encoder
from llm_merge.families.encoder_decoder import EncoderDecoder
from llm_merge.families.reranker import Reranker

FAMILIES: dict[str, Family] = {family.name: family for family in (Decoder(), Encoder(), Reranker(), EncoderDecoder())}


def get_family(model_type: str) -> Family:
    """The family called `model_type`. Raises RecipeError naming those there are."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise RecipeError(f"The model type `{model_type}` is not known: use one of {known}.", field="model_type")
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "get_family"]
