"""TRL's GRPO on a mixture: rewards of completions train the router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer  # type: ignore[attr-defined]  # trl exports it lazily

from ...errors import PeftMoeError
from ...routing.context import routing_inputs
from ...tuner.config.domains import domain_columns
from ...tuner.config.mixture import MoLoraConfig
from ..data.domain_labels import DOMAIN, DOMAIN_INDEX
from .checks import mixture_config
from .reference_mixin import ReferenceMixin, replaced_arguments


class MoLoraGRPOTrainer(ReferenceMixin, GRPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """TRL's ``GRPOTrainer`` for mixtures; takes the same arguments, and ``reference``.

    Args:
        reference: for ``beta`` above 0: "start" (the default) is the mixture at the start of training, "base"
            the base without the mixture.

    The mixture itself generates the completions, with its KV cache. A router that decides once per prompt
    decides in generation as in the training pass. Engines with weights of their own (vLLM) need a mixture
    that can be merged.

    Raises:
        PeftMoeError: besides the errors of :class:`RouterTrainerMixin`: an engine or tools would sample from
            another policy than the trained one; or ``reference`` is set with ``beta=0``.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        *more: Any,
        reference: str | None = None,
        **named: Any,
    ) -> None:
        beta = float(getattr(args, "beta", 0.0))
        if reference is not None and beta == 0:
            raise PeftMoeError(f"reference={reference!r} has no effect with beta=0; set beta in GRPOConfig")
        own_reference = self._make_reference(reference, args)
        follows = bool(getattr(args, "sync_ref_model", False))
        if follows and beta == 0:
            raise PeftMoeError("sync_ref_model=True has no effect with beta=0; set beta in GRPOConfig")
        config = named.get("peft_config")
        if config is None and isinstance(model, nn.Module):
            _, config = mixture_config(model)
        if isinstance(config, MoLoraConfig):
            check_sampling(config, args, named)
        self._domains_B: Tensor | None = None
        # With beta above 0, TRL would copy the adapter with all its experts.
        with replaced_arguments(args, beta=0.0, sync_ref_model=False):
            super().__init__(model, reward_funcs, args, *more, **named)
        self.beta = self.args.beta
        if self.beta:
            self.ref_model: Any = own_reference
            self._begin_reference(own_reference, follows)

    def _keep_domains(self) -> None:
        # Samples are a list until their completions are generated, so that no collator sees them, and rewards
        # may read their domain.
        pass

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if any(DOMAIN in sample for sample in inputs):
            names = [sample.get(DOMAIN) for sample in inputs]
            listed = next((name for name in names if isinstance(name, list)), None)
            if listed is not None:
                raise PeftMoeError(f"domain={listed!r}: a prompt has one domain; name one expert")
            column = domain_columns(self.mixture)
            self._domains_B = torch.tensor([column(name) for name in names], device=self.accelerator.device)
        try:
            with routing_inputs(domains=self._domains_B):
                output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if self._domains_B is not None:
                output[DOMAIN_INDEX] = self._domains_B
        finally:
            self._domains_B = None
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **more: Any,
    ) -> Any:
        """Run the trainer's own method; each part of a batch of completions gets its domains."""
        trl_method = super()._get_per_token_logps_and_entropies
        domains_B, rows = self._domains_B, len(input_ids)
        if domains_B is None or batch_size is None or batch_size >= rows:
            return trl_method(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **more)
        if any(isinstance(value, Tensor) for value in more.values()):
            raise PeftMoeError(
                "a `domain` column together with images needs whole batches; set steps_per_generation=1 or "
                "leave the column out"
            )
        parts = []
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            with routing_inputs(domains=domains_B[part]):
                parts.append(trl_method(model, input_ids[part], attention_mask[part], logits_to_keep, **more))
        return torch.cat([logps for logps, *_ in parts]), None, None


def check_sampling(config: MoLoraConfig, args: Any, named: dict[str, Any]) -> None:
    """Check that completions come from the policy that is trained.

    Args:
        config: the mixture's.
        args: the trainer's arguments.
        named: further arguments of the trainer's constructor.

    Raises:
        PeftMoeError: an engine needs merged weights or packs prompts, or tools interrupt a completion.
    """
    if config.scorer.reads_input:
        if getattr(args, "use_vllm", False):
            raise PeftMoeError(
                f"use_vllm=True needs the mixture merged into the base, and router={config.router!r} "
                "routes by its input; set use_vllm=False (the mixture generates by itself), or train "
                "router='static', whose gates are constant"
            )
        if getattr(args, "use_transformers_continuous_batching", False):
            raise PeftMoeError(
                f"use_transformers_continuous_batching=True packs prompts into one row, where "
                f"router={config.router!r} cannot tell them apart; set it to False"
            )
    tools = next((name for name in ("tools", "environment_factory") if named.get(name) is not None), None)
    if tools is not None and config.router_granularity != "token":
        raise PeftMoeError(
            f"{tools} puts results into the middle of a completion: router={config.router!r} would decide "
            "again when it generates after them, but not when it trains; take a router with "
            "router_granularity='token'"
        )
