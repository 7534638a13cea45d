"""What a merge is worth on a task, for analyses that ask it of hundreds of merges differing in one layer.

The live side of `contributions.Scorer`: models in memory that follow recipes, layers replaced in place, the hidden
states below a replaced layer kept, and every cell remembered by content. It decides nothing: which merges are compared,
and what follows from it, is `contributions.py`'s and `hi_merging.py`'s business.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from llm_merge.activation_cache import PrefixCache
from llm_merge.cell_store import CellStore
from llm_merge.chain import chain_of
from llm_merge.contributions import Values
from llm_merge.families.base import check_stop
from llm_merge.layer_map import layer_map
from llm_merge.measurement_keys import reading_hash, recipe_content, row_hash
from llm_merge.metrics import PreparedMetric, measure
from llm_merge.plan import Plan, make_plan
from llm_merge.plan_changes import differs
from llm_merge.recipe import Recipe
from llm_merge.source_cache import SourceCache
from llm_merge.workbench import free_memory

if TYPE_CHECKING:
    from llm_merge.workbench import Workbench

PLANS = 64
"""Plans kept: the anchors of an analysis, and a few variants."""
SOURCE_BYTES = 3 * 1024**3
STATE_BYTES = 2 * 1024**3
PROBE_ROWS = 2


class LayerScorer:
    """`whole` and `changed` for the tasks' rows, on resident models.

    benches     one or more of the same architecture; with as many as there are anchors (specialists, base, merge) no
                model is poured twice
    tasks       each task's rows, made ready for one metric
    store       where values are kept by content, by default in memory
    state_bytes, source_bytes   memory for kept hidden states (of all benches) and for tensors of the source models
    stop        asked before every layer: raises Stopped
    reported    tasks that are only measured whole: no hidden states are kept for their rows

    All benches must compute in one type. A bench's lock is held while it measures; one that somebody else changed in
    between is poured again.
    """

    def __init__(
        self,
        benches: Sequence[Workbench],
        tasks: Mapping[str, PreparedMetric],
        *,
        store: CellStore | None = None,
        stop: threading.Event | None = None,
        state_bytes: int = STATE_BYTES,
        source_bytes: int | None = None,
        reported: Collection[str] = (),
    ) -> None:
        self.benches, self.tasks, self.stop = list(benches), dict(tasks), stop
        self.reported = frozenset(reported)
        self.store = store or CellStore(None)
        self.measured = 0  # cells that were not remembered
        self._caches = [PrefixCache(bench, state_bytes // len(self.benches), stop) for bench in self.benches]
        # What each bench was last made to hold.
        self._anchors: list[tuple[Recipe, Plan] | None] = [None] * len(self.benches)
        self._recorded: list[set[tuple[Recipe, str]]] = [set() for _ in self.benches]
        self._used = list(range(len(self.benches)))  # bench numbers, the one used longest ago first
        self._plans: OrderedDict[Recipe, Plan] = OrderedDict()
        self._rows = {name: _rows_key(task, self.benches[0]) for name, task in self.tasks.items()}
        self._depth = len(chain_of(self.benches[0].model) or ())
        self._starts: dict[str, int] = {}
        self.read = SourceCache(min(SOURCE_BYTES, free_memory() // 8) if source_bytes is None else source_bytes).read
        for bench in self.benches:
            bench.read = self.read

    # ── Scorer ───────────────────────────────────────────────────────────────────────────────────────────────────

    def whole(self, recipe: Recipe, task: str) -> Values:
        """The merge's values on the task's rows, one a row, higher is better."""
        check_stop(self.stop)
        key = self.key(recipe, task)
        known = self.store.get(key)
        if known is not None:
            return known
        with self._bench_for(recipe) as number:
            return self._keep(key, self._record(number, recipe, task))

    def changed(self, anchor: Recipe, variant: Recipe, layer: str, task: str) -> Values:
        """`variant`'s values, found from what `anchor` computes below the layer where they differ."""
        check_stop(self.stop)
        key = self.key(variant, task)
        known = self.store.get(key)
        if known is not None:
            return known
        plan = self.plan(variant)
        if not differs(self.plan(anchor), plan):  # the layer's delta is 0: the same model
            return self._keep(key, self.whole(anchor, task), measured=False)
        with self._bench_for(anchor) as number:
            bench, cache = self.benches[number], self._caches[number]
            start = self._start_of(layer) if self._can_start(number) else 0
            if start > 0 and (anchor, task) not in self._recorded[number]:
                self._keep(self.key(anchor, task), self._record(number, anchor, task))
            with bench.swapped(plan, self.stop), cache.starting_at((anchor, task), start):
                return self._keep(key, measure(bench, self.tasks[task], self.stop))

    # ── what it stands on ────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, recipe: Recipe) -> Plan:
        """The recipe's plan; of a recipe over the same models as one before, without opening anything."""
        plan = self._plans.get(recipe)
        if plan is None:
            like = next(reversed(self._plans.values()), None)
            plan = make_plan(recipe) if like is None else like.following(recipe)
            self._plans[recipe] = plan
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(recipe)
        return plan

    def key(self, recipe: Recipe, task: str) -> str:
        """The content of merge, rows, metric and computation: equal keys, equal values."""
        return recipe_content(self.plan(recipe), self._rows[task])

    @contextmanager
    def holding(self, recipe: Recipe) -> Iterator[Workbench]:
        """A bench that is the whole merge, for as long as the block lasts."""
        with self._bench_for(recipe) as number:
            yield self.benches[number]

    @contextmanager
    def _bench_for(self, recipe: Recipe) -> Iterator[int]:
        """The number of a bench that holds the recipe, locked. If none does, the one used longest ago is poured; a
        bench that has held nothing of ours yet, and holds this already, is taken first."""
        number = self._number_of(recipe)
        self._used.remove(number)
        self._used.append(number)
        bench = self.benches[number]
        with bench.lock:
            held = self._anchors[number]
            if held is None or held[0] != recipe or held[1] is not bench.plan:
                for slot in self._recorded[number]:
                    self._caches[number].drop(slot)
                self._recorded[number].clear()
                self._anchors[number], plan = None, self.plan(recipe)
                bench.follow(plan, self.stop)
                self._anchors[number] = recipe, plan
            yield number

    def _number_of(self, recipe: Recipe) -> int:
        for number, held in enumerate(self._anchors):
            if held is not None and held[0] == recipe:
                return number
        plan, new = self.plan(recipe), [number for number, held in enumerate(self._anchors) if held is None]
        return next((number for number in new if not self.benches[number].differs(plan)), self._used[0])

    def _record(self, number: int, recipe: Recipe, task: str) -> Values:
        """The values of a whole model, its hidden states kept for what will differ from it in one layer."""
        bench, cache, rows = self.benches[number], self._caches[number], self.tasks[task]
        if task in self.reported or not self._can_start(number):
            return measure(bench, rows, self.stop)
        with cache.recording((recipe, task), range(1, self._depth + 1)):
            values = measure(bench, rows, self.stop)
        self._recorded[number].add((recipe, task))
        return values

    def _can_start(self, number: int) -> bool:
        """Whether runs may start in the middle: tried once per model, on a few rows.

        An answer that is generated token by token cannot: its later tokens are other inputs.
        """
        task = next(iter(self.tasks.values()))
        if task.metric.kind == "generated":
            return False
        few = _few(task)
        return self._caches[number].works(lambda: measure(self.benches[number], few, self.stop))

    def _start_of(self, layer: str) -> int:
        """The block at which a change in this layer begins to matter; 0 is the whole model."""
        if not self._starts:
            groups = layer_map(tensor.name for tensor in next(iter(self._plans.values())).tensors)
            after = {"norm": self._depth, "head": self._depth}
            self._starts = {g.key: after.get(g.key, 0) if g.layer is None else g.layer for g in groups.groups}
        return self._starts.get(layer, 0)

    def _keep(self, key: str, values: Values, *, measured: bool = True) -> Values:
        if self.store.get(key) is None:
            self.measured += measured
            self.store.put(key, values)
        return values


def _few(task: PreparedMetric) -> PreparedMetric:
    """The same metric on the first rows, for a trial."""
    count = min(PROBE_ROWS, len(task))
    if task.prepared is None:
        return replace(task, rows=task.rows[:count])
    if task.metric.kind == "choice":
        count = 1
        return replace(task, rows=task.rows[:1], prepared=replace(
            task.prepared, rows=task.prepared.rows[: len(task.rows[0]["choices"])]))  # fmt: skip
    return replace(task, rows=task.rows[:count], prepared=replace(task.prepared, rows=task.prepared.rows[:count]))


def _rows_key(task: PreparedMetric, bench: Workbench) -> tuple[str, ...]:
    """Everything about rows, metric and computation that a value depends on, beside the merge."""
    reading = reading_hash(bench.checkpoint, task.model_type, task.settings, task.format)
    kind = bench.device.partition(":")[0]
    rows = tuple(row_hash(row) for row in task.rows)
    return (task.metric.name, task.key if task.metric.kind == "generated" else "", reading, kind,
            str(bench.dtype).removeprefix("torch."), *rows)  # fmt: skip
