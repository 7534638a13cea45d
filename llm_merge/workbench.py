"""One model in memory that follows a recipe: every merge to be measured or tried is poured into the same parameters.

Values are rounded to the type that the merge would be saved in before they are used, so what is tried is what is saved.
The source models are only read, and nothing of one recipe is left when the next one is followed. This module knows
devices and memory; it does not know how tensors are merged, nor what the model is used for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm_merge.checkpoint import Checkpoint, open_checkpoint
from llm_merge.errors import CheckpointError, MergeError, Stopped
from llm_merge.families import Family, get_family
from llm_merge.plan import Plan, TensorPlan, make_plan, size_text
from llm_merge.plan_changes import changed_tensors, differs
from llm_merge.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from llm_merge.merge import Reader

WORKING_ROOM = 1.3
"""What a resident model needs, as a multiple of its weights: one tensor being merged, and activations."""


class Workbench:
    """A resident model.

    checkpoint  gives architecture, tokenizer and pooling
    device      "auto" is CUDA when there is one, else MPS, else the processor
    dtype       None: the checkpoint's 16-bit type on CUDA and MPS; on the processor float32 if it fits, else bfloat16
    plan        what the parameters hold now; None before the first `follow` and after one that was interrupted
    read        how tensors of the sources are read; a search over many merges sets one that remembers
    lock        whoever follows a recipe and then uses the model holds it, so that nobody changes the weights between

    Raises CheckpointError for a model that cannot be built, MergeError when the memory does not suffice.
    """

    def __init__(
        self, checkpoint: Checkpoint, model_type: str, device: str = "auto", *, dtype: torch.dtype | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.model_type = model_type
        self.family: Family = get_family(model_type)
        self.device = choose_device(device)
        self.dtype = dtype or choose_dtype(checkpoint, self.device)
        self.plan: Plan | None = None
        self.read: Reader = Checkpoint.read
        self._converts = False
        self._places: dict[str, torch.Tensor] = {}
        self._poured: frozenset[str] = frozenset()  # names of tensors that are known to fill the model
        self.lock = threading.RLock()
        self.tokenizer = self.family.load_tokenizer(checkpoint)
        self.model = self.family.skeleton(checkpoint)
        _materialise(self.model, self.device, self.dtype)
        self._find_places()

    @property
    def nbytes(self) -> int:
        """Bytes of the resident weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def follow(self, recipe: Recipe | Plan, stop: threading.Event | None = None) -> None:
        """Make the model the merge that the recipe describes.

        Only tensors whose part of the plan changed are computed again. Raises IncompatibleModels as planning does,
        CheckpointError when the merge lacks weights that the model needs, Stopped when asked to stop.
        """
        plan = recipe if isinstance(recipe, Plan) else make_plan(recipe)
        with self.lock:
            self._become(plan, list(changed_tensors(self.plan, plan)), stop)

    def differs(self, plan: Plan) -> bool:
        """Whether following the plan would change a tensor."""
        return differs(self.plan, plan)

    @contextmanager
    def swapped(self, plan: Plan, stop: threading.Event | None = None) -> Iterator[None]:
        """The model as `plan` for a while, then to the bit as it was: for a plan that differs in few tensors.

        What is replaced is kept beside meanwhile. Needs a plan that was followed before; raises as `follow` does.
        """
        with self.lock:
            before = self.plan
            if before is None or before.separate_head != plan.separate_head:
                raise MergeError("Only a model that follows a recipe can be changed for a while: call follow first.")
            todo = list(changed_tensors(before, plan))
            # Where tensors are converted, others than those named may change, so all are made again.
            names = [] if self._converts else [self._place_of(tensor.name) for tensor in todo]
            kept = {name: self._places[name].clone() for name in names if name is not None}
            try:
                self._become(plan, todo, stop)
                yield
            finally:
                if self._converts:
                    self.plan = None
                    self.follow(before)
                else:
                    for name, value in kept.items():
                        self._places[name].copy_(value)
                    self.plan = before

    def _become(self, plan: Plan, todo: list[TensorPlan], stop: threading.Event | None) -> None:
        self.plan = None
        if todo:
            self._pour(plan, todo, stop)
        self.plan = plan

    def _pour(self, plan: Plan, todo: list[TensorPlan], stop: threading.Event | None) -> None:
        import torch

        from llm_merge.merge import merged_tensor

        if plan.separate_head:
            self._untie_head()
        names = frozenset(tensor.name for tensor in plan.tensors)
        if names != self._poured or self._converts:
            missing = self._missing({place for name in names if (place := self._place_of(name))})
            self._converts, self._poured = bool(missing), names
            if missing:
                self._pour_converted(plan, missing, stop)
                return
        with torch.no_grad():
            for tensor in todo:
                if stop is not None and stop.is_set():
                    raise Stopped
                place = self._place_of(tensor.name)
                if place is not None:  # a tensor that this kind of model has no use for, such as another head
                    _copy(self._places[place], merged_tensor(plan, tensor, self.read), tensor.name, self.checkpoint)

    def places(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Checkpoint tensor → the resident parameter or buffer that holds it, without those that have none.

        Tied tensors share one. Changing a value in place changes what the model is: `follow` does not know of it.
        """
        self._find_places()  # of the model that is here now: a copy of a bench may have been given another
        found = {name: self._place_of(name) for name in names}
        return {name: self._places[place] for name, place in found.items() if place is not None}

    def _place_of(self, name: str) -> str | None:
        return _place_of(name, self._places, self.model.base_model_prefix)

    def _find_places(self) -> None:
        """Every parameter and saved buffer by each of its names, also the second name of a tied one."""
        self._places = dict(self.model.state_dict(keep_vars=True))

    def _missing(self, filled: set[str]) -> list[str]:
        """Parameters that the merge leaves empty. Tied ones count as filled; unused ones are set to 0."""
        done = {self._places[name].data_ptr() for name in filled}
        parameters = dict(self.model.named_parameters())
        missing = [name for name, parameter in parameters.items() if parameter.data_ptr() not in done]
        for name in list(missing):
            if any(part in name for part in self.family.optional):
                parameters[name].zero_()
                missing.remove(name)
        return missing

    def _pour_converted(self, plan: Plan, missing: list[str], stop: threading.Event | None) -> None:
        """For models whose classes arrange the weights otherwise than their files do (experts in one tensor).

        transformers knows how, but only while it loads: the merge is held in memory once and loaded by it.
        """
        import torch

        from llm_merge.merge import merged_tensor

        values = {}
        for tensor in plan.tensors:
            if stop is not None and stop.is_set():
                raise Stopped
            values[tensor.name] = merged_tensor(plan, tensor, self.read)
        quiet = type(self.model)
        loaded, report = quiet.from_pretrained(
            None, config=self.model.config, state_dict=values, dtype=self.dtype, output_loading_info=True
        )
        lacking = sorted(report["missing_keys"])
        if lacking:
            name = self.checkpoint.reference
            some = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
            raise CheckpointError(
                f"{name} has no weights for {some}, which {self.family.article_title} needs: choose another model "
                "type or a complete checkpoint.",
                field=name,
            )
        with torch.no_grad():
            for (_, mine), (_, theirs) in zip(self.model.named_parameters(), loaded.named_parameters(), strict=True):
                mine.copy_(theirs)

    def _untie_head(self) -> None:
        """Give the output head weights of its own: some model of the merge has them."""
        import torch

        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is not None and head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
            self.model.config.tie_word_embeddings = False
            self._find_places()


def bench_for(recipe: Recipe, model_type: str, device: str = "auto", base: str | None = None) -> Workbench:
    """A workbench on the architecture of `base` (default: the recipe's base, else its first model), following it."""
    checkpoint = open_checkpoint(base or recipe.base_model or recipe.references[0])
    bench = Workbench(checkpoint, model_type, device)
    bench.follow(recipe)
    return bench


def choose_device(device: str = "auto") -> str:
    """The device's name for torch. Raises MergeError for one that is not there."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device in ("auto", ""):
        return "cuda" if cuda else "mps" if mps else "cpu"
    kind, _, number = device.partition(":")
    known = {"cpu": True, "cuda": cuda, "mps": mps}
    if kind not in known or (number and not number.isdigit()):
        raise MergeError(f"The device `{device}` is not known: use auto, cpu, cuda, cuda:1 or mps.", field="device")
    if not known[kind] or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise MergeError(f"The device `{device}` is not on this machine: use auto or cpu.", field="device")
    return device


def choose_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """The type to compute in. Raises MergeError, with both sizes, when the model does not fit into memory at all."""
    import torch

    main: torch.dtype = getattr(torch, checkpoint.main_dtype)
    if main not in (torch.float16, torch.bfloat16, torch.float32):
        main = torch.float32
    elements = resident_elements(checkpoint)
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
        need = elements * main.itemsize
    else:
        free = free_memory()
        if device == "cpu":
            main = torch.float32 if elements * 4 * WORKING_ROOM <= free else torch.bfloat16
        need = elements * main.itemsize
    if need * WORKING_ROOM > free:
        raise MergeError(
            f"{checkpoint.reference} needs {size_text(need * WORKING_ROOM)} of memory and {size_text(free)} are free: "
            "close other programs or choose a smaller model.",
            field="device",
        )
    return main


def resident_elements(checkpoint: Checkpoint) -> int:
    """Numbers in the weights, a tied head counted once."""
    total = 0
    for info in checkpoint.tensors.values():
        count = 1
        for size in info.shape:
            count *= size
        total += count
    return total


def free_memory() -> int:
    """Bytes of memory that a new model may take; what the system says is available. 8 GB where it does not say."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * 10**9


def _materialise(model: Any, device: str, dtype: torch.dtype) -> None:
    """Give every parameter memory, once; what shares a parameter goes on sharing it. Buffers keep their values."""
    import torch

    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        exact += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                kind = torch.float32 if set(exact) & {*prefix.split("."), name} else dtype
                empty = torch.empty(parameter.shape, dtype=kind, device=device)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
                made[id(made[id(parameter)])] = made[id(parameter)]
                made[-id(parameter)] = parameter  # keep the old one alive, or its id would be given out again
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device.type == "meta":
                raise CheckpointError(f"The buffer {prefix}.{name} of {type(model).__name__} cannot be computed here.")
            kept = name in module._non_persistent_buffers_set or not buffer.is_floating_point()
            module._buffers[name] = buffer.to(device=device, dtype=buffer.dtype if kept else dtype)


def _place_of(name: str, places: dict[str, torch.Tensor], prefix: str) -> str | None:
    """The model's name for a checkpoint's tensor. Files may carry the body's name before it, or old words for norms."""
    for old, new in (("", ""), ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if old and not name.endswith(old):
            continue
        stem = name.removesuffix(old) + new
        for candidate in (stem, stem.removeprefix(f"{prefix}."), f"{prefix}.{stem}"):
            if candidate in places:
                return candidate
    return None


def _copy(place: torch.Tensor, value: torch.Tensor, name: str, checkpoint: Checkpoint) -> None:
    if place.shape != value.shape:
        shapes = f"{tuple(value.shape)} in the files and {tuple(place.shape)} by its config"
        raise CheckpointError(f"{name} of {checkpoint.reference} is {shapes}: the checkpoint is damaged.")
    place.copy_(value)
