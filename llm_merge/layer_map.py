"""Which transformer block a tensor belongs to, and what it does there: told from its name alone.

One row per naming scheme, one per kind of module. Knows neither values, shapes nor configs, and imports no torch;
names that no row fits are "other", and `LayerMap.known` says whether any scheme was recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from llm_merge.errors import MergeError

# Where each family keeps its blocks: everything up to the block's number. When a stem with "encoder" and one with
# "decoder" occur, the model has two chains; OPT's decoder and T5's encoder alone are the only ones in theirs.
SCHEMES = tuple(
    re.compile(rf"(?P<stem>{stem}\.)(?P<number>\d+)\.")
    for stem in (
        # Llama, Mistral, Mixtral, Qwen, Gemma, Phi, OLMo, StableLM, ModernBERT; deeper in models that also see images.
        r"(?:model\.|language_model\.|transformer\.)*layers",
        r"(?:transformer\.|model\.)?h",  # GPT-2, GPT-J, Falcon, BLOOM
        r"gpt_neox\.layers",  # GPT-NeoX, Pythia
        r"(?:transformer\.)?blocks",  # MPT
        r"(?:[a-z_]+\.)?encoder\.layer",  # BERT, RoBERTa, XLM-R, Electra, DeBERTa, MPNet: with and without a prefix
        r"(?:distilbert\.)?transformer\.layer",  # DistilBERT
        r"(?:transformer\.)?(?:encoder|decoder)\.block",  # T5
        r"(?:model\.)?(?:encoder|decoder)\.layers",  # BART, Marian, Pegasus, OPT
    )
)

_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|final_logits_bias|classifier|pre_classifier|classification_head|score|qa_outputs"
    r"|pooler|vocab_transform|vocab_layer_norm|vocab_projector|(?:generator|discriminator)_predictions"
    r"|generator_lm_head|lm_predictions|cls\.(?:predictions|seq_relationship))(?:\.|$)|^head\.|^decoder\.(?:weight|bias)$"
)
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens\w*|wte|wpe|tok_embeddings|embed_in|embed_positions|shared|embeddings|embeddings_project"
    r"|\w+_embeddings|layernorm_embedding|word_embeddings_layernorm)(?:\.|$)|(?:^|\.)encoder\.LayerNorm\."
)
_FINAL_NORM = re.compile(
    r"(?:(?:model|transformer|language_model|gpt_neox|encoder|decoder)\.)*(?:norm|norm_f|ln_f|final_norm|layer_norm"
    r"|final_layer_?norm)$"
)
_NORM = re.compile(r"(?:^|\.)(?:\w*norm\w*|ln_?\w*)$", re.IGNORECASE)
_END = re.compile(r"\.(?:weight|bias)$|(?<=[qkv])_bias$")  # q_bias and v_bias: DeBERTa's parameters

# What the end of a name says, without `.weight` or `.bias`. The first row that fits counts: c_proj, dense and Wo
# occur twice in a block, and the part before them tells which one it is.
KINDS: Sequence[tuple[str, re.Pattern[str]]] = tuple(
    (kind, re.compile(rf"(?:^|\.)(?:{ends})$"))
    for kind, ends in (
        ("q", r"q|wq|q_proj|q_lin|query|query_proj|pos_q_proj|pos_query_proj|q_[ab]_proj"),
        ("k", r"k|wk|k_proj|k_lin|key|key_proj|pos_key_proj|pos_proj"),
        ("v", r"v|wv|v_proj|v_lin|value|value_proj"),
        ("qkv", r"qkv|qkv_proj|c_attn|query_key_value|Wqkv|in_proj|att_proj|kv_a_proj_with_mqa|kv_b_proj"),
        ("o", r"o|o_proj|out_proj|out_lin|attn_out|attention\.output\.dense"),
        ("o", r"(?:attn|self_attn|attention|self_attention)\.(?:c_proj|dense|Wo|wo)"),
        ("gate", r"gate_proj|wi_0|w1"),
        ("up", r"up_proj|c_fc|fc1|fc_in|lin1|wi|wi_1|w3|dense_h_to_4h|intermediate\.dense"),
        ("down", r"down_proj|mlp\.c_proj|fc2|fc_out|lin2|wo|mlp\.Wo|w2|dense_4h_to_h|ff_out|output\.dense"),
        ("mlp", r"gate_up_proj|Wi|ff_proj"),
    )
)


@dataclass(frozen=True)
class Group:
    """One transformer block, or what lies outside of the blocks.

    key      "0", "1", … for the blocks of one chain; "encoder.3", "decoder.3" where there are two; outside of blocks
             "embeddings", "norm" (the final one), "head", "other"
    title    how to call it: "Layer 7", "Encoder layer 3", "Embeddings", "Final norm", "Output head", "Other tensors"
    layer    its place among all blocks in order of depth, the encoder's before the decoder's; None outside of blocks
    filter   the substring of tensor names (mergekit's `filter`) that matches this block and nothing else; "" outside
             of blocks, and for blocks whose names are a part of other tensors' names
    tensors  names, in the order given
    """

    key: str
    title: str
    layer: int | None
    filter: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class LayerMap:
    """All tensors in groups: embeddings, blocks in order of depth, final norm, head, other; none is empty.

    known   False: no naming scheme was recognised, and everything is "other"
    """

    groups: tuple[Group, ...]
    known: bool

    @property
    def blocks(self) -> tuple[Group, ...]:
        """The transformer blocks in order of depth."""
        return tuple(group for group in self.groups if group.layer is not None)

    def group_of(self, tensor: str) -> Group:
        """The group that a tensor is in. Raises MergeError for a name that was not given."""
        group = self._by_tensor.get(tensor)
        if group is None:
            raise MergeError(f"No tensor of this model is called “{tensor}”: check the name.", field="tensor")
        return group

    def block(self, key: str) -> Group:
        """The block with this key. Raises MergeError if there is none."""
        found = next((group for group in self.blocks if group.key == key), None)
        if found is None:
            blocks = self.blocks
            known = f"choose from {blocks[0].key} to {blocks[-1].key}" if blocks else "no layers were recognised in it"
            raise MergeError(f"This model has no layer “{key}”: {known}.", field="layer")
        return found

    @cached_property
    def _by_tensor(self) -> Mapping[str, Group]:
        return {tensor: group for group in self.groups for tensor in group.tensors}


def layer_map(names: Iterable[str]) -> LayerMap:
    """Sorts a model's tensor names into blocks and what lies around them. The same names always give the same map."""
    names = list(names)
    blocks = _blocks(names)
    inside = {name for group in blocks for name in group.tensors}
    around: dict[str, list[str]] = {"embeddings": [], "norm": [], "head": [], "other": []}
    for name in names:
        if name not in inside:
            around[_place(name) if blocks else "other"].append(name)
    titles = {"embeddings": "Embeddings", "norm": "Final norm", "head": "Output head", "other": "Other tensors"}
    outer = {key: Group(key, titles[key], None, "", tuple(found)) for key, found in around.items() if found}
    first = outer.pop("embeddings", None)
    return LayerMap((*([first] if first else []), *blocks, *outer.values()), known=bool(blocks))


def kind_of(name: str) -> str:
    """What a tensor does: "q" "k" "v" "qkv" "o" "gate" "up" "down" "mlp" "norm" "embeddings" "head" "other".

    "qkv" and "mlp" are several of these stored as one tensor (gate and up). A bias has the kind of its weight. The
    router of a mixture of experts is "other".
    """
    module = _END.sub("", name)
    if _NORM.search(module):
        return "norm"
    if (place := _place(name)) in ("embeddings", "head"):
        return place
    return next((kind for kind, pattern in KINDS if pattern.search(module)), "other")


def _place(name: str) -> str:
    """Where a tensor outside of the blocks lies: the key of its group."""
    if _EMBEDDINGS.search(name):
        return "embeddings"
    if _HEAD.search(name):
        return "head"
    return "norm" if _FINAL_NORM.match(_END.sub("", name)) else "other"


def _blocks(names: Sequence[str]) -> list[Group]:
    """The blocks of the scheme that most names follow, in order of depth."""
    blocks: dict[tuple[str, int], list[str]] = {}  # by stem and number
    for scheme in SCHEMES:
        found = _found(scheme, names)
        if sum(map(len, found.values())) > sum(map(len, blocks.values())):
            blocks = found
    two = len({stem for stem, _ in blocks}) > 1
    places = sorted(blocks, key=lambda place: (_chain(place[0]) == "decoder", place[1]))
    filters = _filters(places, blocks, names)
    groups = []
    for layer, place in enumerate(places):
        chain, number = _chain(place[0]), place[1]
        key = f"{chain}.{number}" if two else str(number)
        title = f"{chain.capitalize()} layer {number}" if two else f"Layer {number}"
        groups.append(Group(key, title, layer, filters[place], tuple(blocks[place])))
    return groups


def _found(scheme: re.Pattern[str], names: Sequence[str]) -> dict[tuple[str, int], list[str]]:
    """Names by stem and number. Of two stems for one chain (a second tower), the one with more names counts."""
    stems: dict[str, dict[tuple[str, int], list[str]]] = {}
    for name in names:
        if match := scheme.match(name):
            stem = match["stem"]
            stems.setdefault(stem, {}).setdefault((stem, int(match["number"])), []).append(name)
    best: dict[str, dict[tuple[str, int], list[str]]] = {}
    for stem, blocks in sorted(stems.items(), key=lambda item: sum(map(len, item[1].values()))):
        best[_chain(stem)] = blocks
    return {place: found for blocks in best.values() for place, found in blocks.items()}


def _chain(stem: str) -> str:
    """Which half of an encoder-decoder a stem is of."""
    return next((chain for chain in ("encoder", "decoder") if f"{chain}." in stem), "")


def _filters(
    places: Sequence[tuple[str, int]], blocks: Mapping[tuple[str, int], Sequence[str]], names: Sequence[str]
) -> dict[tuple[str, int], str]:
    """For each block the shortest end of its path that no tensor elsewhere contains; as long for all blocks."""
    longest = max((stem.count(".") for stem, _ in places), default=0)
    filters: dict[tuple[str, int], str] = {}
    for length in range(1, longest + 1):
        for place in places:
            parts = place[0].removesuffix(".").split(".")[-length:]
            text = f"{'.'.join(parts)}.{place[1]}."
            exact = sum(text in name for name in names) == len(blocks[place])
            filters[place] = text if exact else ""
        if all(filters.values()):
            break
    return filters
