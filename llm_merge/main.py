"""The functions that people call: mix models by weights, by example data, or layer by layer for large ones.

Names, arguments and meaning are LM-Cocktail's (Xiao et al. 2023, arXiv:2311.13534); additions are keyword-only. Each is
a few lines over recipe, plan, merge and output, and returns the model that transformers loads.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_merge.card import Provenance
from llm_merge.checkpoint import open_checkpoint
from llm_merge.compatibility import KINDS, short_name
from llm_merge.errors import RecipeError
from llm_merge.families import Family, get_family
from llm_merge.merge import MemorySink, rounding_warning, run
from llm_merge.output import FolderSink, check_output, output_config
from llm_merge.plan import Plan, make_plan
from llm_merge.recipe import Recipe
from llm_merge.weights import validate_temperature, weights_from_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_FITTING = {
    "encoder": ("encoder", "decoder")
}  # a language model embeds texts too; other types take their own kind only


def mix_models(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float],
    output_path: str | None = None,
    *,
    dtype: str | None = None,
) -> PreTrainedModel:
    """Mix models by the given weights, Σ wᵢ·xᵢ, and return the result.

    model_names_or_paths    folders, hub ids ``org/name[@revision]``, or ``base+adapter``; at least two
    model_type              "decoder", "encoder", "reranker" or "encoder-decoder"
    weights                 one per model; they must sum to 1 within 1e-3
    output_path             folder to save model, tokenizer and model card to; it must not exist or be empty
    dtype                   type of the result; None: that of the first model

    Raises RecipeError, IncompatibleModels (with every problem found), CheckpointError or OutputError.
    """
    plan, family = _plan(model_names_or_paths, model_type, weights, dtype)
    if output_path is not None:
        return _save_and_load(plan, family, output_path)
    return _in_memory(plan, family)


def mix_models_with_data(
    model_names_or_paths: Sequence[str],
    model_type: str,
    example_data: Any,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: str | None = None,
    *,
    dtype: str | None = None,
    device: str = "auto",
    format: str = "auto",
    seed: int = 0,
) -> PreTrainedModel:
    """Mix models by weights that a few examples decide, softmax(−loss / temperature), and return the result.

    example_data        rows {"input", "output"} for decoders, {"query", "pos", "neg"} for encoders
    temperature         in the loss's unit, nats; lower follows the losses more closely
    batch_size          rows at a time; for encoders each query competes with the passages of its batch
    max_input_length    tokens of a row; longer ones are cut
    neg_number          at most this many negatives per row, drawn by `seed`
    format              "auto", "chat" or "plain": how decoder rows are written for the models

    The other arguments are those of `mix_models`. Raises ExampleError, too, naming every row that cannot be used.
    """
    validate_temperature(temperature)
    if model_type == "reranker":
        raise RecipeError(
            "Weights from example data are not there yet for rerankers: give the weights to mix_models.",
            field="model_type",
        )
    count = max(1, len(model_names_or_paths))
    plan, _ = _plan(model_names_or_paths, model_type, [1 / count] * count, dtype)
    if output_path is not None:
        check_output(output_path, plan)  # now, not after the models were measured
    losses, rows_digest, rows = _mean_losses(
        plan,
        model_type,
        example_data,
        device,
        format=format,
        max_input_length=max_input_length,
        batch_size=batch_size,
        neg_number=neg_number,
        seed=seed,
    )
    recipe = weights_from_losses(model_names_or_paths, losses, temperature, dtype=dtype)
    logger.info("losses %s, weights %s", losses, recipe.weights)
    plan, family = make_plan(recipe), get_family(model_type)
    if output_path is None:
        return _in_memory(plan, family)
    origin = Provenance(losses=losses, temperature=temperature, rows=rows, rows_hash=rows_digest, seed=seed)
    return _save_and_load(plan, family, output_path, origin)


def mix_models_by_layers(
    model_names_or_paths: Sequence[str],
    model_type: str,
    weights: Sequence[float],
    output_path: str | None = None,
    *,
    dtype: str | None = None,
) -> PreTrainedModel:
    """`mix_models` for models that do not fit into memory together: one tensor of each at a time, straight to disk.

    Without `output_path` the result lies in a temporary folder, which is removed when the returned model is no longer
    used. The arguments and errors are those of `mix_models`.
    """
    plan, family = _plan(model_names_or_paths, model_type, weights, dtype)
    if output_path is not None:
        return _save_and_load(plan, family, output_path)
    folder = tempfile.mkdtemp(prefix="llm-merge-")
    try:
        model = _save_and_load(plan, family, str(Path(folder) / "merged"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The model's tensors are mapped from the file. Linux and macOS keep mapped pages of a removed file: a tensor that
    # outlives the model stays valid; Windows refuses to remove it, and leaves it to the system's own clean-up.
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def _plan(models: Sequence[str], model_type: str, weights: Sequence[float], dtype: str | None) -> tuple[Plan, Family]:
    """Everything that can be wrong is said here, before a weight is read."""
    family = get_family(model_type)
    if isinstance(models, (str, Path)):
        raise RecipeError(
            f"model_names_or_paths is one name, “{models}”: give a list of at least two models.",
            field="model_names_or_paths",
        )
    references = [str(model) for model in models]
    if len(references) < 2:
        raise RecipeError(
            f"Mixing takes at least two models, and {len(references) or 'none'} was given: add another one.",
            field="model_names_or_paths",
        )
    plan = make_plan(Recipe.linear(references, weights, dtype=dtype))
    found = plan.base.model_type_guess
    if found not in _FITTING.get(model_type, (model_type,)):
        raise RecipeError(
            f"“{short_name(plan.base.reference)}” is {KINDS[found]} ({plan.base.architecture}), not "
            f"{KINDS[model_type]}: pass model_type='{found}'.",
            field="model_type",
        )
    return plan, family


def _mean_losses(
    plan: Plan, model_type: str, example_data: Any, device: str, **settings: Any
) -> tuple[tuple[float, ...], str, int]:
    """Each model's mean loss in nats on the rows, in the order of the plan; the rows' hash, and how many there are."""
    from llm_merge import evaluation
    from llm_merge.examples import check_rows, rows_hash
    from llm_merge.workbench import Workbench

    rows = check_rows(example_data, model_type)
    options = evaluation.EvaluationSettings(**settings)
    bench = Workbench(open_checkpoint(plan.base.reference), model_type, device)
    fmt = evaluation.resolve_format(plan.checkpoints, options.format)
    prepared = evaluation.prepare(rows, model_type, bench.tokenizer, options, fmt)
    means: dict[str, float] = {}
    for reference in dict.fromkeys(plan.recipe.references):
        bench.follow(Recipe.single(reference))
        values = [loss for _, loss in evaluation.losses(bench, prepared)]
        means[reference] = math.fsum(values) / len(values)
    return tuple(means[reference] for reference in plan.recipe.references), rows_hash(rows), len(rows)


def _save_and_load(plan: Plan, family: Family, output_path: str, origin: Provenance | None = None) -> PreTrainedModel:
    import transformers

    sink = FolderSink(output_path, model_type=family.name, provenance=_with_notes(plan, origin or Provenance()))
    for _ in run(plan, sink):
        pass
    loader = getattr(transformers, family.auto_class)
    return _model(loader.from_pretrained(sink.path, dtype="auto", local_files_only=True, use_safetensors=True))


def _in_memory(plan: Plan, family: Family) -> PreTrainedModel:
    import torch

    _with_notes(plan, Provenance())
    sink = MemorySink()
    for _ in run(plan, sink):
        pass
    config = type(family.config(plan.base)).from_dict(output_config(plan))
    kind = type(family.skeleton(plan.base))
    return _model(kind.from_pretrained(None, config=config, state_dict=sink.tensors, dtype=getattr(torch, plan.dtype)))


def _model(loaded: Any) -> PreTrainedModel:
    model: PreTrainedModel = loaded.eval()
    return model


def _with_notes(plan: Plan, origin: Provenance) -> Provenance:
    """Log the plan's warnings; the card has them anyway, and the one about rounding, too."""
    rounding = rounding_warning(plan)
    for warning in (*plan.warnings, *([rounding] if rounding else [])):
        logger.warning("%s", warning)
    return replace(origin, notes=(*origin.notes, str(rounding))) if rounding else origin
