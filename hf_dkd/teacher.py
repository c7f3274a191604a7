"""The teacher: load, freeze, place, choose its inputs, run."""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import find_labels

from .heads import auto_class_name, bare_model, head_of
from .language_head import LanguageHead, Trial, language_head, tried
from .rows import logits_of

TEACHER_PREFIX = "teacher_"

_MAIN_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")


class Teacher:
    """A frozen model that emits logits: always in eval mode, without gradient, and never saved with the student.

    It reads the columns that its own `forward` names; a column `teacher_X` takes the place of `X`.

    Args:
        model: a model of transformers, a peft model, or any module whose output is, or holds, the logits. It is put in
            eval mode and, but for parameters that it shares with the student, stops requiring gradients.
        adapter: the peft adapter of `model` to run with. Default: the one that is active.
        label_names: the names of the classes in the order of the logits, where `model.config.id2label` does not tell.

    Raises:
        ValueError: for an adapter that the model does not have.
    """

    def __init__(self, model: nn.Module, *, adapter: str | None = None, label_names: Sequence[str] | None = None):
        if adapter is not None and adapter not in getattr(model, "peft_config", {}):
            known = ", ".join(getattr(model, "peft_config", {})) or "none"
            raise ValueError(f"The teacher has no adapter {adapter!r}; its adapters: {known}.")
        self.model = model
        self.adapter = adapter
        self.shares_student = False
        self.is_compiled = False
        self._shared: list[nn.Module] = []
        self._label_names = None if label_names is None else list(label_names)
        self._main_input_name: str | None = None
        self._source_name: str | None = None
        self._parameters = inspect.signature(bare_model(model).forward).parameters
        labels = {*find_labels(type(bare_model(model))), "labels"}
        self.columns = [
            name
            for name, parameter in self._parameters.items()
            if name not in labels and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        """The columns that the teacher's `forward` names, without labels."""

    @classmethod
    def from_adapter(cls, student: nn.Module, adapter_name: str | None = None) -> "Teacher":
        """The student's own base model as its teacher, with no second copy of the weights.

        Args:
            student: the peft model that is trained.
            adapter_name: another adapter of the same base that acts as the teacher; None switches adapters off. Head
                weights that peft trains whole (`modules_to_save`) are then those from before training.

        Raises:
            ValueError: where the student is no peft model or lacks that adapter.
        """
        if not (hasattr(student, "peft_config") and hasattr(student, "get_base_model")):
            raise ValueError(
                f"Teacher.from_adapter needs a peft model, got {type(student).__name__}: without an adapter to switch "
                "off, the student would teach itself. Wrap it with peft.get_peft_model first."
            )
        teacher = cls(student, adapter=adapter_name)
        teacher.shares_student = True
        return teacher

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, student: nn.Module, *, revision: str | None = None, **init_kwargs: Any
    ) -> "Teacher":
        """Load a teacher from a path or the Hub by the Auto class that loads models of the student's kind.

        Weights are read from safetensors, and no remote code runs, unless `init_kwargs` says otherwise.

        Raises:
            ValueError: where the student's architecture does not tell the Auto class, or where the checkpoint lacks
                weights, such as those of the head.
        """
        auto_name = auto_class_name(student)
        if auto_name is None:
            raise ValueError(
                f"Cannot tell which Auto class loads a teacher for {type(bare_model(student)).__name__}: load it "
                "yourself and pass the module, DKDTrainer(..., teacher=model)."
            )
        init_kwargs = {"use_safetensors": True, **init_kwargs, "output_loading_info": True}
        model, info = getattr(transformers, auto_name).from_pretrained(name_or_path, revision=revision, **init_kwargs)
        random = sorted({*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))})
        if random:
            raise ValueError(
                f"The teacher {str(name_or_path)!r} lacks weights: {', '.join(random[:5])}. They would be random, so "
                "that the student would learn from noise: fine-tune the teacher first. Where they do not matter, load "
                "the model yourself and pass it, DKDTrainer(..., teacher=model)."
            )
        teacher = cls(model)
        teacher._source_name = os.fspath(name_or_path)
        return teacher

    @property
    def name(self) -> str:
        """Where the teacher came from, or its class."""
        model = bare_model(self.model)
        name = self._source_name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        if not self.shares_student:
            return name
        return f"{name} with {'adapters off' if self.adapter is None else f'adapter {self.adapter!r}'}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating type of the weights; None where there are none."""
        dtype = getattr(self.model, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        return next((parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()), None)

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes, in the order of the logits; None where unknown."""
        return self._label_names or class_names_of(self.model)

    def prepare(self, student: nn.Module, device: torch.device, compiled: bool = False) -> None:
        """Freeze the teacher and put it on `device`, where it is not placed already (quantized, dispatched, shared).

        With `compiled` it runs under `torch.compile`, unless it shares the student's weights.

        Raises:
            ValueError: where the teacher is the student, or shares parameters that are trained.
        """
        self._main_input_name = getattr(student, "main_input_name", None)
        if self.shares_student:
            self._check_shared(student)
            return
        of_student = set(student.modules())
        self._shared = [module for module in self.model.modules() if module in of_student]
        students = {id(parameter): parameter.requires_grad for parameter in student.parameters()}
        if any(students.get(id(parameter)) for parameter in self.model.parameters()):
            raise ValueError(
                "The teacher shares trained parameters with the student, so that it would change with it. To distil "
                "from the student's own base model use Teacher.from_adapter(student); otherwise load a second model or "
                "copy.deepcopy the first."
            )
        for parameter in self.model.parameters():
            if id(parameter) not in students:
                parameter.requires_grad_(False)
        if self.adapter is not None:
            self.model.set_adapter(self.adapter, inference_mode=True)  # type: ignore[operator]
        self.model.eval()
        if compiled and not self.is_compiled:
            self.model.compile()
            self.is_compiled = True
        placed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)
        if not placed:
            self.model.to(device)

    def _check_shared(self, student: nn.Module) -> None:
        if bare_model(self.model) is not bare_model(student):
            raise ValueError(
                "Teacher.from_adapter got another model than the student that is trained: pass it the trainer's model."
            )
        active = student.base_model.active_adapters  # type: ignore[union-attr]
        if self.adapter is not None and self.adapter in active:  # type: ignore[operator]
            raise ValueError(
                f"Adapter {self.adapter!r} is the one that is trained, so that the student would teach itself. Name "
                "another adapter, or None to switch adapters off."
            )

    def columns_in(self, batch: Mapping[str, Any]) -> list[str]:
        """The columns of `batch` that the teacher reads, under their names there."""
        return list(self._sources(batch).values())

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the teacher reads of `batch`: the columns its `forward` names, `teacher_`-prefixed ones first.

        Raises:
            ValueError: where there are none, or where a shared mask does not fit the teacher's own ids.
        """
        chosen = {name: batch[source] for name, source in self._sources(batch).items()}
        if not chosen:
            raise ValueError(
                "The batch has none of the columns that the teacher reads. Its forward names "
                f"{', '.join(self.columns)}; the batch has {', '.join(batch)}. Add the missing ones, prefixed by "
                f"{TEACHER_PREFIX!r} if the student must not see them."
            )
        _check_lengths(chosen, batch)
        if self._needs_decoder_inputs(chosen, batch):
            # The model would derive them from labels, at the price of a loss nobody needs.
            prepare = getattr(bare_model(self.model), "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:
                chosen["labels"] = batch["labels"]
            else:
                chosen["decoder_input_ids"] = prepare(labels=batch["labels"])
        if self._can_cache:
            chosen["use_cache"] = False
        chosen |= dict.fromkeys(self._needless_outputs, False)
        return {name: self._cast(value) for name, value in chosen.items()}

    @torch.no_grad()
    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The teacher's logits for `batch`: (B, C), (B, L, C), or start and end logits as (2, B, L).

        Computed under `no_grad`, not `inference_mode`: autograd could not save inference tensors for the student.
        """
        with self._acting():
            return logits_of(self.model(**self.inputs(batch)), "teacher", head_of(self.model))

    @torch.no_grad()
    def hidden_states(self, batch: Mapping[str, Any], head: LanguageHead) -> Tensor:
        """What stands in front of its `head`, (B, L, d), for `batch`; no logits are made."""
        taken: list[Tensor] = []
        with self._acting(), head.handing_over(taken.append):
            self.model(**self.inputs(batch))
        return taken[0]

    def trial(self, batch: Mapping[str, Any], half_precision: bool = False) -> Trial:
        """What a trial of the model on `batch`, a few tokens, shows of its head."""
        with self._acting():
            return tried(self.model, language_head(self.model), self.inputs(batch), half_precision=half_precision)

    @contextmanager
    def _acting(self) -> Iterator[None]:
        if not self.shares_student:
            training = [module for module in self._shared if module.training]
            # To look is a few times as fast as eval, which assigns to every module.
            if any(module.training for module in self.model.modules()):
                self.model.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True
            return
        training = [module for module in self.model.modules() if module.training]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.eval()
        try:
            with self._adapter_of_teacher():
                yield
        finally:
            # Switching adapters rewrites requires_grad: of frozen adapters too.
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    @contextmanager
    def _adapter_of_teacher(self) -> Iterator[None]:
        model: Any = self.model
        if self.adapter is None:
            with model.disable_adapter():
                yield
            return
        # The peft model keeps one name, its layers may have several active.
        active, of_layers = model.active_adapter, list(model.base_model.active_adapters)
        model.set_adapter(self.adapter)
        try:
            yield
        finally:
            model.set_adapter(active)
            model.base_model.set_adapter(of_layers)

    def _sources(self, batch: Mapping[str, Any]) -> dict[str, str]:
        """For each input of the teacher's `forward`, the column of `batch` that feeds it."""
        sources = {name: source for name in self.columns if (source := _source(name, batch)) is not None}
        main_input = getattr(bare_model(self.model), "main_input_name", None)
        if sources and (main_input not in self.columns or {main_input, "inputs_embeds"} & set(sources)):
            return sources
        # A plain module, such as forward(x), takes the main input under the name that it has.
        required = [
            name
            for name, p in self._parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        main = [self._main_input_name] if self._main_input_name else _MAIN_INPUTS
        source = next((found for name in main if (found := _source(name, batch)) is not None), None)
        return {required[0]: source} if len(required) == 1 and source is not None else {}

    @property
    def _can_cache(self) -> bool:
        # Vision-language models pass use_cache on to their language model without naming it.
        model: Any = bare_model(self.model)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        generates = hasattr(model, "can_generate") and model.can_generate()
        return "use_cache" in self._parameters or (takes_any and generates)

    @property
    def _needless_outputs(self) -> list[str]:
        # Where the config asks for them, all layers' outputs would be kept.
        config = getattr(bare_model(self.model), "config", None)
        return [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)]

    def _needs_decoder_inputs(self, chosen: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
        labels = batch.get("labels")
        return (
            getattr(getattr(bare_model(self.model), "config", None), "is_encoder_decoder", False)
            and "decoder_input_ids" not in chosen
            and "decoder_inputs_embeds" not in chosen
            and labels is not None
            and labels.ndim == 2
        )

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and self.dtype is not None:
            return value.to(self.dtype)
        return value


def class_names_of(model: nn.Module) -> list[str] | None:
    """`config.id2label` in the order of the classes; None where the model has none."""
    names = getattr(getattr(bare_model(model), "config", None), "id2label", None)
    # Read from JSON the keys are strings, and "10" would come before "2".
    return [names[index] for index in sorted(names, key=int)] if names else None


def _source(name: str, batch: Mapping[str, Any]) -> str | None:
    """The column of `batch` that feeds the teacher's input `name`."""
    return next((source for source in (TEACHER_PREFIX + name, name) if batch.get(source) is not None), None)


def _check_lengths(chosen: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    own_ids = batch.get(TEACHER_PREFIX + "input_ids")
    if own_ids is None:
        return
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        shared = chosen.get(name)
        if shared is not None and TEACHER_PREFIX + name not in batch and shared.shape != own_ids.shape:
            raise ValueError(
                f"teacher_input_ids have shape {tuple(own_ids.shape)} but {name}, shared with the student, has "
                f"{tuple(shared.shape)}: bring {TEACHER_PREFIX}{name} too. DataCollatorWithTeacherInputs makes both."
            )
