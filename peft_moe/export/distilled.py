"""One LoRA of a chosen rank that imitates a mixture, whatever its router reads; the gap is measured.

It starts from the mixture's mean gates on the training texts, folded and cut by SVD, and is trained by
distillation. Base weights are in memory once: mixture and student share them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import set_seed

from ..errors import PeftMoeError
from ..io.adapter_files import lora_fields, tensor_key, write_adapter
from ..io.values import is_count, is_index
from ..tuner.layers.shared_router import MODEL_ROUTER
from .base_model import find_tokenizer, load_on_base, packed_files, take_along
from .lora import Folded, beside, lora_card
from .mixture_tensors import Mixture
from .report import ExportReport

_BATCHES_OF_GATES = 16


@dataclass
class Distillation:
    """What a distilled LoRA learns from, and how.

    Attributes:
        data: texts, as :func:`peft_moe.io.text_data.load_text_dataset` takes them: a .jsonl file of
            ``prompt`` and ``completion``, ``messages`` or ``text``; or a dataset.
        eval_data: held-out texts; None splits ``eval_fraction`` of ``data`` off.
        eval_fraction: see there.
        steps: of training; 0 keeps the start.
        learning_rate, batch_size, max_length, seed: of training.
        temperature: of the distillation.
        trainer: further fields of TRL's ``SFTConfig``.
        tokenizer: of the base; None reads it from the mixture's folder or the base's.
    """

    data: Any
    eval_data: Any = None
    eval_fraction: float = 0.1
    steps: int = 200
    learning_rate: float = 1e-3
    batch_size: int = 8
    max_length: int | None = 1024
    seed: int = 0
    temperature: float = 1.0
    trainer: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None


def check_distillation(mixture: Mixture, rank: int | None, how: Distillation | None) -> None:
    """Refuse what cannot be distilled, before anything loads.

    Raises:
        PeftMoeError: no rank, no texts, numbers out of range, or a mixture that writes no text.
    """
    if rank is None or how is None:
        missing = "rank" if rank is None else "data"
        raise PeftMoeError(
            f"to='distilled-lora' needs {missing}: the rank of the LoRA and texts to learn from, as in "
            "--rank 32 --data texts.jsonl"
        )
    task = getattr(mixture.config.task_type, "value", mixture.config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise PeftMoeError(f"task_type={task!r}: only causal language models can be distilled")
    if mixture.extras():
        raise PeftMoeError(
            f"{mixture.label} trained {len(mixture.extras())} tensors beside experts and routers (biases, "
            "whole modules), which one LoRA cannot imitate; serve it with peft_moe imported"
        )
    for name, valid, least in (("steps", is_index, 0), ("batch_size", is_count, 1)):
        value = getattr(how, name)
        if not valid(value):
            raise PeftMoeError(f"{name}={value!r} must be a whole number of at least {least}")
    for name, below in (
        ("learning_rate", float("inf")),
        ("temperature", float("inf")),
        ("eval_fraction", 1.0),
    ):
        if not 0 < getattr(how, name) < below:
            raise PeftMoeError(f"{name}={getattr(how, name)!r} must be above 0 and below {below:g}")


def export_distilled(
    mixture: Mixture,
    folder: Path,
    report: ExportReport,
    *,
    rank: int | None,
    base: str | None,
    dtype: torch.dtype | None,
    how: Distillation | None,
) -> None:
    """Train and write the LoRA; ``report.measured`` gets the gap."""
    from ..training.trainers.student import ImitationTrainer, batches, mean_gates, measure, sft_config

    assert how is not None
    assert rank is not None
    train, heldout = _texts(how)
    teacher, source = _teacher(mixture, base, report)
    training = teacher.training
    places = (mixture.folder, source)
    tokenizer = how.tokenizer or find_tokenizer(places, "give it as Distillation(tokenizer=…)")
    with tempfile.TemporaryDirectory() as scratch:
        # A first trainer prepares the texts, on which the mixture's mean gates are counted.
        arguments = sft_config(_arguments(how, scratch))
        kinds: dict[str, Any] = {
            "train_dataset": train,
            "eval_dataset": heldout,
            "processing_class": tokenizer,
        }
        rest: dict[str, Any] = {"teacher": teacher, "temperature": how.temperature, "args": arguments}
        student_base = _without_mixture(teacher)
        set_seed(how.seed)
        trainer = ImitationTrainer(student_base, **rest, **kinds)
        for name in ("train", "eval"):
            if len(getattr(trainer, f"{name}_dataset")) == 0:
                raise PeftMoeError(f"no text for {name} is left at max_length={how.max_length}; raise it")
        gates = mean_gates(teacher, batches(trainer, trainer.train_dataset, _BATCHES_OF_GATES))
        start = Folded(mixture, _by_module(mixture, gates), rank=rank, dtype=torch.float32)
        student = _student(student_base, start, mixture, Path(scratch) / "start")
        kinds = {**kinds, "train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
        trainer = ImitationTrainer(student, **rest, **kinds)
        before, tokens = measure(teacher, student, batches(trainer, trainer.eval_dataset))
        if how.steps:
            trainer.train()
        after, _ = measure(teacher, student, batches(trainer, trainer.eval_dataset))
        teacher.train(training)
        texts = {"train": len(kinds["train_dataset"]), "held_out": len(kinds["eval_dataset"])}
    gaps = {"base": before["base"], "start": before["student"], "distilled": after["student"]}
    rows = {name: asdict(gap) for name, gap in {**gaps, "mixture": before["mixture"]}.items()}
    report.rank = int(start.fields["r"])
    report.measured = {"steps": how.steps, "texts": texts, "held_out_tokens": tokens, "held_out": rows}
    if rows["base"]["kl"] > 0:
        report.measured["kl_closed"] = 1 - rows["distilled"]["kl"] / rows["base"]["kl"]
    _write(mixture, student, start, folder, report, dtype)
    for place in (source, mixture.folder):
        take_along(place, folder, text_only=True)


def _texts(how: Distillation) -> tuple[Any, Any]:
    """Training and held-out records, checked; a plain dataset is taken as it is."""
    from ..io.text_data import load_text_dataset

    def load(source: Any) -> Any:
        return source if hasattr(source, "column_names") else load_text_dataset(source)

    data = load(how.data)
    if how.eval_data is not None:
        return data, load(how.eval_data)
    count = max(1, round(len(data) * how.eval_fraction))
    if len(data) <= count:
        raise PeftMoeError(
            f"{len(data)} texts leave none to train on beside {count} held-out ones; give more"
        )
    halves = data.train_test_split(test_size=count, seed=how.seed)
    return halves["train"], halves["test"]


def _teacher(mixture: Mixture, base: str | None, report: ExportReport) -> tuple[PeftModel, str]:
    if mixture.model is not None:
        return mixture.model, str(getattr(mixture.model.get_base_model(), "name_or_path", ""))
    packed = packed_files(base or mixture.base)
    if packed is not None:
        raise PeftMoeError(f"{packed}; load base and mixture yourself, and give the model to export()")
    return load_on_base(mixture, base or mixture.base, None, report)


def _arguments(how: Distillation, scratch: str) -> dict[str, Any]:
    given = {
        "output_dir": scratch,
        "max_steps": max(1, how.steps),
        "learning_rate": how.learning_rate,
        "per_device_train_batch_size": how.batch_size,
        "per_device_eval_batch_size": how.batch_size,
        "max_length": how.max_length,
        "seed": how.seed,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, how.steps // 10),
        "weight_decay": 0.0,
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": max(1, how.steps // 10),
        **how.trainer,
    }
    if not torch.cuda.is_available():
        given = {"dataloader_pin_memory": False, **given}
    return given


def _without_mixture(teacher: PeftModel) -> nn.Module:
    """The base alone, as modules of its own over the same weights."""
    shared: dict[int, Any] = {id(t): t for t in [*teacher.parameters(), *teacher.buffers()]}
    base: Any = copy.deepcopy(teacher, shared).unload()
    return base.requires_grad_(False)


def _by_module(mixture: Mixture, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gates of each module from those of the router that decides for it."""
    model = f"{MODEL_ROUTER}.{mixture.adapter}"
    found = {}
    for module in mixture.layers:
        known = (gates.get(name) for name in (module, module.rpartition(".")[0], model))
        one = next((gate for gate in known if gate is not None), None)
        if one is not None:
            found[module] = one.float()
    return {module: found.get(module, torch.zeros(mixture.config.num_experts)) for module in mixture.layers}


def _student(base: Any, start: Folded, mixture: Mixture, scratch: Path) -> PeftModel:
    scratch.mkdir()
    write_adapter(scratch, start.factors, start.fields, card="")
    return PeftModel.from_pretrained(base, scratch, is_trainable=True)


def _write(
    mixture: Mixture,
    student: PeftModel,
    start: Folded,
    folder: Path,
    report: ExportReport,
    dtype: torch.dtype | None,
) -> None:
    trained = get_peft_model_state_dict(student)
    factors = {}
    for module in start.factors:
        A, B = (trained[tensor_key(module, side)] for side in "AB")
        factors[module] = (A, B) if dtype is None else (A.to(dtype), B.to(dtype))
    fields = {**lora_fields(factors, start.scaling), **beside(mixture)}
    write_adapter(folder, factors, fields, card=lora_card(mixture, report))
