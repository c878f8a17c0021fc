"""Training with TRL, without output, with the same arguments for mixtures, X-LoRA and the wide LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # trl exports lazily

from ...training import MoLoraSFTTrainer
from ...training.data import augmentation
from ...tuner.config.mixture import MoLoraConfig
from .texts import Sample

LOGGED_LOSSES = 20


class FullLogitsTrainer(SFTTrainer):
    """Trainer for models whose forward pass reads the base's hidden states (X-LoRA).

    TRL's own loss uses a fused language-model head, whose output has no hidden states.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the model's own loss."""
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


TRAINERS = {"mixture": MoLoraSFTTrainer, "xlora": FullLogitsTrainer, "width": SFTTrainer}


def train(
    model: Any,
    kind: str,
    samples: list[Sample],
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    max_length: int | None,
    bf16: bool,
    robust: Mapping[str, float],
    seed: int,
    out: Path,
    **options: Any,
) -> list[float]:
    """Train the parameters that the model leaves trainable.

    Args:
        model: a PeftModel; for "width" any model.
        kind: a key of `TRAINERS`.
        samples: samples with prompt, completion and domain.
        tokenizer: the base's tokenizer.
        steps, batch_size, learning_rate, max_length, bf16: as in ``SFTConfig``, with cosine decay.
        robust: options of ``training.data.augmentation`` by name; only for mixtures.
        seed: seed of the order of samples and of these options.
        out: folder for the trainer's own files.
        options: further arguments of the trainer, for example a teacher.

    Returns:
        About `LOGGED_LOSSES` training losses, each the mean since the last one.
    """
    disable_progress_bars()
    args = SFTConfig(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        bf16=bf16,
        seed=seed,
        logging_steps=max(1, steps // LOGGED_LOSSES),
        **_common_arguments(model),
    )
    data = Dataset.from_list([dict(sample) for sample in samples])
    if kind != "mixture":
        data = data.remove_columns("domain")
    if robust:
        data = _augmented(data, model.peft_config[model.active_adapter], robust, seed)
    trainer = TRAINERS[kind](model, args=args, train_dataset=data, processing_class=tokenizer, **options)
    trainer.train_dataset = augmentation.with_switches(
        trainer.train_dataset, robust.get("switching_share", 0.0), seed, max_length
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _augmented(data: Dataset, config: MoLoraConfig, robust: Mapping[str, float], seed: int) -> Dataset:
    random_share = robust.get("domain_randomisation", 0.0)
    augmentation.check_random_domains(config, random_share)
    data = augmentation.with_generic_share(data, robust.get("generic_share"), config.expert_names, seed)
    return augmentation.with_random_domains(data, random_share, seed)


def _common_arguments(model: Any) -> dict[str, Any]:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return {
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
