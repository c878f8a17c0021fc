"""Training by TRL, quiet: the same arguments for mixtures, X-LoRA and one wide LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ...training import MoLoraSFTTrainer
from ...training.data import augmentation as robustness
from ...tuner.config.mixture import MoLoraConfig
from .texts import Sample

LOGGED = 20


class FullLogitsTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """For models that need the base's hidden states in their forward pass (X-LoRA).

    TRL's own loss goes through a fused language-model head whose output has none.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss."""
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
    """Train what the model leaves trainable.

    Args:
        model: a PeftModel; for "width" any model.
        kind: a key of `TRAINERS`.
        samples: with prompt, completion and domain.
        tokenizer: of the base.
        steps, batch_size, learning_rate, max_length, bf16: as in ``SFTConfig``; cosine decay.
        robust: options of ``training.robustness`` by name; of mixtures alone.
        seed: of the order of samples, and of what those options draw.
        out: folder for the trainer's own files.
        options: further arguments of the trainer, such as a teacher.

    Returns:
        The training loss, about `LOGGED` values, each a mean since the one before.
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
        logging_steps=max(1, steps // LOGGED),
        **_same_for_all(model),
    )
    data = Dataset.from_list([dict(sample) for sample in samples])
    if kind != "mixture":
        data = data.remove_columns("domain")
    if robust:
        data = _robust(data, model.peft_config[model.active_adapter], robust, seed)
    trainer = TRAINERS[kind](model, args=args, train_dataset=data, processing_class=tokenizer, **options)
    trainer.train_dataset = robustness.with_switches(
        trainer.train_dataset, robust.get("switching_share", 0.0), seed, max_length
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _robust(data: Dataset, config: MoLoraConfig, robust: Mapping[str, float], seed: int) -> Dataset:
    randomised = robust.get("domain_randomisation", 0.0)
    robustness.check_random_domains(config, randomised)
    data = robustness.with_generic_share(data, robust.get("generic_share"), config.expert_names, seed)
    return robustness.with_random_domains(data, randomised, seed)


def _same_for_all(model: Any) -> dict[str, Any]:
    cpu = next(model.parameters()).device.type == "cpu"
    return {
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
