"""What a ``MoLoraConfig`` refuses field by field: types, ranges, names. Each test reads one value only."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any

from ...errors import PeftMoeError, near_matches
from ...experts.spec import NAME_RULE, RESERVED_NAMES, ExpertSpec, source_name
from ...io.dtypes import NAMED_DTYPES
from ...io.values import (
    Predicate,
    dict_of,
    filled_list_of,
    is_bool,
    is_count,
    is_finite,
    is_index,
    is_not_negative,
    is_positive,
    is_regex,
    is_share,
    is_word,
    list_of,
    optional,
)
from ...ops import check_backend
from ...routers import SCORING_FUNCS
from ...routers.losses import coefficient_fields
from ...routers.pooling import POOLS
from .fields import MixtureFields

# Weights of losses that a trainer adds, each a field of its own.
COEFFICIENTS = (*coefficient_fields(), "expert_orthogonality_coef", "distillation_coef")

# A damaged config must not fill the screen.
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120

_CHOICES: dict[str, tuple[str, ...]] = {
    "router_scope": ("module", "block", "model"),
    "router_below_tap": ("probe", "base", "prompt"),
    "router_granularity": ("token", "sequence", "running"),
    "router_pool": POOLS,
    "scoring_func": tuple(SCORING_FUNCS),
    "mixing": ("linear", "block"),
    "bias": ("none", "all", "molora_only"),
    "topk_method": ("greedy", "top_p", "expert_choice"),
}


def check_fields(config: MixtureFields) -> None:
    """Each field by itself.

    Raises:
        PeftMoeError: naming the field, its value and the fix.
    """
    for name, (wanted, valid) in _VALID.items():
        value = getattr(config, name)
        if not valid(value):
            raise PeftMoeError(f"{name}={_shown.repr(value)} must be {wanted}")
    for name, options in _CHOICES.items():
        value = getattr(config, name)
        if value not in options and (value is not None or name in ("bias", "mixing")):
            raise PeftMoeError(f"{name}={value!r} is not known.{near_matches(str(value), options)}")
    check_backend(config.backend)
    _check_experts(config.experts)


def _check_experts(experts: Any) -> None:
    if isinstance(experts, bool) or not isinstance(experts, int | dict | list):
        raise PeftMoeError(
            f"experts={experts!r}: give a dict of names and adapter folders, a list of folders, or a "
            "number of fresh experts"
        )
    count = experts if isinstance(experts, int) else len(experts)
    if count < 1:
        raise PeftMoeError(f"experts={experts!r}: a mixture needs at least one expert; add one")
    if isinstance(experts, dict):
        for name, source in experts.items():
            if not isinstance(name, str) or not isinstance(source, str) or not source:
                raise PeftMoeError(
                    f"experts[{name!r}]={source!r}: names and sources must be text; "
                    "give the adapter's folder or Hub id"
                )
    if isinstance(experts, list):
        _check_expert_list(experts)


def _check_expert_list(experts: list[Any]) -> None:
    if all(isinstance(entry, dict) for entry in experts):
        names = [entry.get("name") for entry in experts]
        for entry in experts:
            _check_record(entry)
        _check_distinct(names)
    elif all(isinstance(entry, str) and entry for entry in experts):
        names = [source_name(entry) for entry in experts]
    else:
        raise PeftMoeError(f"experts={experts!r}: a list must hold adapter folders or Hub ids, all as text")
    for name in names:
        if not isinstance(name, str) or not name or names.count(name) > 1:
            raise PeftMoeError(
                f"experts: the name {name!r} is missing, no text, or given {names.count(name)} times; "
                "give a dict with a name for each"
            )


def _check_distinct(names: list[Any]) -> None:
    """Of records, whose form is checked; adapters are when they are read."""
    seen: dict[str, str] = {}
    for name in names:
        folded = str(name).casefold()
        if folded in RESERVED_NAMES:
            raise PeftMoeError(f"experts: the name {name!r} is reserved; rename it, for example 'my_{name}'")
        if folded in seen and seen[folded] != name:
            raise PeftMoeError(
                f"experts: the names {seen[folded]!r} and {name!r} are equal but for case; rename one of them"
            )
        seen[folded] = str(name)


def _check_record(record: dict[Any, Any]) -> None:
    unknown = sorted(str(key) for key in set(record) - {f.name for f in fields(ExpertSpec)})
    if unknown:
        raise PeftMoeError(
            f"experts: the record of {record.get('name')!r} has unknown fields {unknown}, which could change "
            "the result; upgrade peft-moe, or remove them"
        )
    for key, (wanted, valid) in _VALID_IN_RECORDS.items():
        if key in record and not valid(record[key]):
            raise PeftMoeError(
                f"experts: the record of {_shown.repr(record.get('name'))} has {key}="
                f"{_shown.repr(record[key])}, which must be {wanted}"
            )


def _is_fingerprint(value: Any) -> bool:
    numbers = value.get("values", {}) if isinstance(value, dict) else None
    return isinstance(numbers, dict) and all(filled_list_of(is_finite)(v) for v in numbers.values())


_NAMES = "a list of module names, or a regex as text"
_TRUTH = "True or False"
_COUNT = "a whole number ≥ 1"
_POSITIVE = "a finite number > 0"
_COUNTS = "a list of whole numbers ≥ 1, one for each group of layers"
_NOT_NEGATIVE = "a finite number ≥ 0; 0 switches it off"

_VALID: dict[str, tuple[str, Predicate]] = {
    "format_version": (_COUNT, is_count),
    "target_modules": (
        f"{_NAMES}; leave it out for the default",
        optional(is_word, lambda v: list_of(is_word)(v) and len(v) > 0),
    ),
    "exclude_modules": (_NAMES, optional(is_word, list_of(is_word))),
    "layers_to_transform": ("a layer's index or a list of them", optional(is_index, list_of(is_index))),
    "layers_pattern": ("the name of the stack of layers, or a list", optional(is_word, list_of(is_word))),
    "modules_to_save": ("a list of module names", optional(list_of(is_word))),
    "trainable_token_indices": (
        "a list of token ids, or a dict of embedding names and such lists",
        optional(list_of(is_index), dict_of(is_word, list_of(is_index))),
    ),
    "r": (_COUNT, is_count),
    "lora_alpha": (_POSITIVE, is_positive),
    "use_rslora": (_TRUTH, is_bool),
    "init_weights": (_TRUTH, is_bool),
    "train_experts": (_TRUTH, optional(is_bool)),
    "router": ("the name of a preset or a registered router, such as 'linear'", is_word),
    "router_tap": ("a layer's index ≥ 0 or a layer's name", optional(is_index, is_word)),
    "router_input_norm": (_TRUTH, optional(is_bool)),
    "router_temperature": (_POSITIVE, optional(is_positive)),
    "router_init_std": (_NOT_NEGATIVE, optional(is_not_negative)),
    "router_window": (_POSITIVE, optional(is_positive)),
    "router_hidden_size": (_COUNT, optional(is_count)),
    "top_k": (_COUNT, optional(is_count)),
    "top_p": ("a number above 0 and below 1", optional(is_share)),
    "routed_scaling_factor": (_POSITIVE, is_positive),
    "shared_experts": ("a list of experts' names", list_of(is_word)),
    "experts_per_layer": (_COUNTS, optional(filled_list_of(is_count))),
    "top_k_per_layer": (_COUNTS, optional(filled_list_of(is_count))),
    "router_bias_update_rate": (_NOT_NEGATIVE, optional(is_not_negative)),
    "router_lbc_delta": ("a number above 0 and below 1", is_share),
    "router_l1_target": ("a number above 0 and below 1", optional(is_share)),
    "distillation_temperature": (_POSITIVE, is_positive),
    "distillation_adaptive": (_TRUTH, is_bool),
    "norm_topk_prob": (_TRUTH, optional(is_bool)),
    "straight_through": (_TRUTH, optional(is_bool)),
    "null_expert": (_TRUTH, optional(is_bool)),
    "allow_base_mismatch": (_TRUTH, is_bool),
    "verify_experts": (_TRUTH, is_bool),
    "base_fingerprint": (
        "an object that injection fills; leave it out",
        optional(_is_fingerprint),
    ),
    "weights_digest": ("text that saving fills; leave it out", optional(is_word)),
    "base_precision": ("text such as 'full' or 'bitsandbytes nf4'; injection fills it", optional(is_word)),
    **dict.fromkeys(COEFFICIENTS, (_NOT_NEGATIVE, is_not_negative)),
    "loss_coefs": (
        "a dict of registered losses' names and finite numbers; 0 switches one off",
        dict_of(is_word, is_finite),
    ),
    # Presets may fill these.
    "router_aux_loss_coef": (_NOT_NEGATIVE, optional(is_not_negative)),
    "router_l1_coef": (_NOT_NEGATIVE, optional(is_not_negative)),
    "router_entropy_coef": ("a finite number; 0 switches it off", is_finite),
}

_TEXT = "text, or left out"
_TARGETS = ("a list of module names or a regex, or left out", optional(is_regex, list_of(is_word)))
# Of one expert in a saved mixture; its fields are those of ``ExpertSpec``.
_VALID_IN_RECORDS: dict[str, tuple[str, Predicate]] = {
    "name": (
        "1 to 64 of the characters [A-Za-z0-9_-]",
        lambda v: isinstance(v, str) and bool(NAME_RULE.fullmatch(v)),
    ),
    **dict.fromkeys(
        ("source", "revision", "sha256", "digest", "base_model", "license"), (_TEXT, optional(is_word))
    ),
    "dtype": ("'float32', 'bfloat16' or 'float16', or left out", lambda v: v in (None, *NAMED_DTYPES)),
    "fan_in_fan_out": _VALID["use_rslora"],
    "r": _VALID["r"],
    "lora_alpha": _VALID["lora_alpha"],
    "use_rslora": _VALID["use_rslora"],
    "rank_pattern": ("regexes with whole numbers ≥ 1", dict_of(is_regex, is_count)),
    "alpha_pattern": ("regexes with finite numbers > 0", dict_of(is_regex, is_positive)),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_to_transform": _VALID["layers_to_transform"],
    "layers_pattern": _VALID["layers_pattern"],
    "trains": (f"{_TRUTH}, or left out", optional(is_bool)),
}
