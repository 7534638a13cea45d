"""The README.md of a merged model: what it is made of, how, and where the weights come from.

Front matter as the hub and mergekit's own tools expect it, then the same for a human reader. The card states what the
plan and the caller know; it measures nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_merge.compatibility import short_name
from llm_merge.hub import hub_name, split_reference
from llm_merge.methods import get_method
from llm_merge.plan import Plan, size_text

if TYPE_CHECKING:
    from llm_merge.families import Family

_USES = {
    "decoder": "text-generation",
    "encoder": "sentence-similarity",
    "reranker": "text-ranking",
    "encoder-decoder": "text2text-generation",
}


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a merge come from; everything empty means that they were given.

    losses      mean loss of each model of the recipe, in nats
    temperature of the softmax over them
    rows        how many example rows, and `rows_hash` which
    notes       anything else worth a sentence each, such as a rounding warning
    """

    losses: tuple[float, ...] = ()
    temperature: float | None = None
    rows: int = 0
    rows_hash: str = ""
    seed: int | None = None
    notes: tuple[str, ...] = ()


def model_card(plan: Plan, family: Family, title: str, provenance: Provenance, hashes: Mapping[str, str]) -> str:
    """Markdown with front matter. `hashes`: SHA-256 of each weights file."""
    parts = [_front_matter(plan, family.name), f"# {title}", _summary(plan), _models(plan, provenance)]
    parts += [_origin(provenance), _recipe(plan), _usage(family.name, family.auto_class, title), _files(plan, hashes)]
    notes = [*(str(warning) for warning in plan.warnings), *provenance.notes]
    if notes:
        parts.append("## Worth knowing\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(plan: Plan, model_type: str) -> str:
    import yaml

    named: list[str] = []
    for checkpoint in (*((plan.base,) if plan.is_task_arithmetic else ()), *plan.checkpoints):
        adapter = split_reference(checkpoint.reference)[1] or (checkpoint.adapter and checkpoint.reference) or ""
        named += [checkpoint.base_identity, adapter]
    # Only what the hub can find: it refuses a card that names a folder of somebody's disk.
    hub_ids = [name.split("@")[0] for name in dict.fromkeys(named) if "/" in name and hub_name(name)]
    entries: dict[str, Any] = {"base_model": hub_ids, "base_model_relation": "merge"} if hub_ids else {}
    entries["library_name"] = "sentence-transformers" if model_type == "encoder" else "transformers"
    if model_type in _USES:
        entries["pipeline_tag"] = _USES[model_type]
    entries["tags"] = ["mergekit", "merge"]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def _summary(plan: Plan) -> str:
    method = get_method(plan.recipe.merge_method)
    count = len(plan.checkpoints)
    return (
        f"A merge of {count} model{'s' if count != 1 else ''} made with LLM Merge.\n\n"
        f"Method: **{method.title}** (`{method.name}`), {method.formula}, {method.paper}. "
        f"Config and tokenizer are those of `{plan.base.reference}`."
    )


def _models(plan: Plan, provenance: Provenance) -> str:
    with_losses = len(provenance.losses) == len(plan.checkpoints)
    lines = ["| model | weight |" + (" loss (nats) |" if with_losses else "")]
    lines.append("| --- | ---: |" + (" ---: |" if with_losses else ""))
    for index, (checkpoint, weight) in enumerate(zip(plan.checkpoints, plan.weights, strict=True)):
        base = f" (adapter of `{checkpoint.base_identity}`)" if checkpoint.adapter else ""
        loss = f" {provenance.losses[index]:.4f} |" if with_losses else ""
        lines.append(f"| {short_name(checkpoint.reference)}: `{checkpoint.reference}`{base} | {weight:.4f} |{loss}")
    return "## Models\n\n" + "\n".join(lines)


def _origin(provenance: Provenance) -> str:
    if provenance.temperature is None:
        return ""
    rows = f"{provenance.rows} example row{'s' if provenance.rows != 1 else ''}"
    digest = f" (SHA-256 `{provenance.rows_hash}`)" if provenance.rows_hash else ""
    seed = f", seed {provenance.seed}" if provenance.seed is not None else ""
    return (
        "## Where the weights come from\n\n"
        f"softmax(−loss / {provenance.temperature:g}) of the models' mean losses on {rows}{digest}{seed}."
    )


def _recipe(plan: Plan) -> str:
    return f"## Recipe\n\n```yaml\n{plan.recipe.to_yaml()}```"


def _usage(model_type: str, auto_class: str, title: str) -> str:
    if model_type == "encoder":
        lines = ["from sentence_transformers import SentenceTransformer", "", f'model = SentenceTransformer("{title}")']
    else:
        lines = [f"from transformers import AutoTokenizer, {auto_class}", "",
                 f'model = {auto_class}.from_pretrained("{title}")',
                 f'tokenizer = AutoTokenizer.from_pretrained("{title}")']  # fmt: skip
    return "## Use it\n\n```python\n" + "\n".join(lines) + "\n```"


def _files(plan: Plan, hashes: Mapping[str, str]) -> str:
    lines = [f"- `{shard.file}`, SHA-256 `{hashes[shard.file]}`" for shard in plan.shards]
    size = f"{len(plan.tensors)} tensors, {size_text(plan.output_bytes)}, {plan.dtype}."
    return "## Weights\n\n" + size + "\n\n" + "\n".join(lines)
