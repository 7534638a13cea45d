"""Layers: which layers help and which fight, and Hi-Merging's way to settle it. A table of contents of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from components import layers_deltas, layers_hand, layers_map, layers_merge, layers_score
from components.page import Page
from components.settings import Settings


@dataclass(frozen=True)
class LayersTab:
    map: layers_map.MapPart
    deltas: layers_deltas.DeltaPart
    hand: layers_hand.HandPart
    merge: layers_merge.MergePart
    score: layers_score.ScorePart


def build(settings: Settings) -> LayersTab:
    return LayersTab(
        map=layers_map.build(settings),
        deltas=layers_deltas.build(settings),
        hand=layers_hand.build(settings),
        merge=layers_merge.build(settings),
        score=layers_score.build(settings),
    )


def wire(tab: LayersTab, page: Page) -> None:
    layers_map.wire(tab.map, page, tab.merge.board)
    layers_deltas.wire(tab.deltas, page, tab.map.show, tab.map.map_box)
    layers_hand.wire(tab.hand, page, tab.map.combine, tab.map.selection)
    layers_merge.wire(tab.merge, page, tab.map.rows, tab.map.metric)
    layers_score.wire(tab.score, page)
