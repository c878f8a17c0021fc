"""``MoLoraConfig``: everything a mixture is told, checked before any model or file is touched."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import TaskType
from peft.utils import CONFIG_NAME, PeftType

from ...errors import PeftMoeError
from ...io.atomic import replace_file
from ...io.digests import file_digest
from ...io.json_files import read_json
from .combination_rules import check_routing, check_shared
from .field_rules import check_fields
from .fields import FORMAT_VERSION, MixtureFields
from .model_card import check_base_on_hub, update_card
from .weights_file import check_weights_file


@dataclass
class MoLoraConfig(MixtureFields):
    """A gated mixture of LoRA experts in the linear layers of a frozen base.

    How it routes is documented at :class:`RoutingFields`, whose fields are this config's as well.

    Args:
        experts: where the experts come from. ``{"math": "path-or-hub-id", …}`` reads trained PEFT LoRA
            adapters (``"org/name@revision"`` pins a Hub revision); a list names them after their
            folders; a number makes that many fresh, trainable experts. In a loaded or injected
            config: the list of records that describe the embedded experts.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save,
            trainable_token_indices, bias: as in ``LoraConfig``; ``bias`` is "none", "all" or
            "molora_only". With trained adapters ``target_modules`` may stay None: the union of what they
            adapt.
        r, lora_alpha, use_rslora, init_weights: of fresh experts only. ``init_weights=False`` starts
            B at random instead of zero (for tests).
        train_experts: whether the experts train as well. Default: fresh ones do, given ones do not.
        mixing: where experts are mixed. "linear": at the output of every linear layer. "block": at that of
            every feed-forward network, y = FFN(x) + Σ g_e (FFN_e(x) - FFN(x)), with one router for each
            (MixLoRA, Mixtral); other layers, such as attention, are mixed per linear beside it. Fresh experts
            then adapt the feed-forward networks where target_modules is left out.
        allow_base_mismatch: accept adapters that name another base model.
        base_precision: how the base's weights were kept when the mixture was made ("full",
            "bitsandbytes nf4"); written at injection, compared at loading.
        base_fingerprint: size and some numbers of the base that the mixture was made on; written at
            injection, compared at loading: another base is refused unless ``allow_base_mismatch`` is set.
        verify_experts: compare weights with the digests in the config whenever they are loaded.
        weights_digest: of the saved routers, and of the experts where they train; written at saving.
        backend: how the mixture is computed; "auto" lets a model of FLOPs and bytes choose for every kind of
            call. It changes speed and memory only. Others: "stacked", "grouped", "gather", "folded",
            "reference", "triton_stacked", "triton_sorted", "triton_gather"; a call that one cannot serve is
            refused with the reason.
        format_version: of the saved layout.

    Raises:
        PeftMoeError: a field or a combination that cannot work, with the value, the reason, the fix.
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # PEFT's own
        # A member that the registration adds to PEFT's enum, which type checkers cannot see.
        self.peft_type = PeftType("MOLORA")
        check_fields(self)
        if self.format_version > FORMAT_VERSION:
            raise PeftMoeError(
                f"format_version={self.format_version} is newer than {FORMAT_VERSION}, the newest that "
                "this peft-moe reads; upgrade peft-moe"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))  # PEFT's habit
        check_shared(self)
        self.fill_from_preset()
        # Of the layer that keeps the fewest columns, where they differ.
        check_routing(self, self.router_settings(top_k=self.smallest_top_k), self.scorer)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """PEFT's reading of a config's file, with the file named where it cannot be read.

        Raises:
            PeftMoeError: the file is no JSON object.
        """
        values = read_json(path_json_file)
        values.pop("runtime_config", None)  # as PEFT does
        return values

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """PEFT's loading of a config; in a folder here, weights that do not fit it are refused at once.

        Raises:
            PeftMoeError: either file is damaged, or they do not belong together.
        """
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, cls) and config.experts_embedded:
            folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
            check_weights_file(folder, config.specs(), all_everywhere=config.experts_per_layer is None)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's saving of a config, in one step; behind weights it also records their digest.

        The model card is written beside it.

        Raises:
            PeftMoeError: the folder or the weights in it cannot be read.
        """
        saved = copy.copy(self)
        # PEFT hands this over right after it has written the weights; alone, a config says nothing of any.
        if "auto_mapping_dict" in kwargs and self.verify_experts:
            part = "all" if self.experts_train else "routers"
            saved.weights_digest = file_digest(save_directory, part)
        if os.path.isfile(save_directory):
            raise PeftMoeError(f"{save_directory} is a file; name a folder to save into")
        place = Path(save_directory)
        place.mkdir(parents=True, exist_ok=True)

        def write(beside: Path) -> None:
            with tempfile.TemporaryDirectory(dir=place, prefix=".config.") as scratch:
                super(MoLoraConfig, saved).save_pretrained(scratch, **kwargs)
                os.rename(os.path.join(scratch, CONFIG_NAME), beside)

        replace_file(place / CONFIG_NAME, write)
        update_card(place, self)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's upload of a config.

        Raises:
            PeftMoeError: the base is a folder on this machine; nothing was uploaded.
        """
        check_base_on_hub(self)
        return super().push_to_hub(*args, **kwargs)

    def own_copy(self) -> MoLoraConfig:
        """Return a config that can be written to; this one stays as it is."""
        own = copy.copy(self)
        own.modules_to_save = copy.copy(self.modules_to_save)
        return own

    def follow_head_of(self, original: MoLoraConfig) -> None:
        """Share the list of saved modules with the caller's config, for two tasks.

        PEFT adds the head's modules to the caller's list once the injection is over, and looks for them in
        this config's list. So both hold one list, which PEFT extends in place.
        """
        if self is not original and self.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
            self.modules_to_save = original.modules_to_save = list(original.modules_to_save or [])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sets are sorted, so that the file's bytes do not depend on hashing."""
        values = super().to_dict()
        values.pop("target_parameters", None)
        if not values.get("loss_coefs"):
            values.pop("loss_coefs", None)  # files without registered losses stay readable by older versions
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
