"""Adapters, full models and saved mixtures by their configs and headers: facts and problems, no weights."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import PeftMoeError
from ..experts.adapter import ExpertFile, spec_of
from ..experts.base_modules import BaseView
from ..experts.checks import check_same_base
from ..experts.config_rules import check_config
from ..experts.extraction.pairs import LINEAR, ExtractionPlan, plan_extraction
from ..experts.extraction.svd import EXACT_UP_TO, RankRule
from ..experts.spec import ExpertSpec
from ..io.adapter_files import PREFIX
from ..io.checkpoint import MODEL_CONFIG, Checkpoint
from ..io.dtypes import FILE_BYTES, NAMED_DTYPES
from ..io.sources import CONFIG_FILE, WEIGHTS_FILE, Source, find_source, read_config
from ..tuner.config.mixture import MoLoraConfig
from .inspection_report import Inspection


def kind_of(location: str) -> str:
    """What is there: "mix file", "adapter", "mixture" or "model".

    Raises:
        PeftMoeError: it is nothing of these.
    """
    path = Path(location).expanduser()
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            return "mix file"
        raise PeftMoeError(f"{location} is a file; give a mix file (.yaml), or a folder")
    source = find_source(path.name or location, location)
    if not source.is_hub:
        here = set(os.listdir(source.location))
        if CONFIG_FILE in here:
            return _kind_of_adapter(source)
        if MODEL_CONFIG in here:
            return "model"
        raise PeftMoeError(
            f"{location} holds neither {CONFIG_FILE} nor {MODEL_CONFIG}; give an adapter or a model"
        )
    try:
        return _kind_of_adapter(source)
    except PeftMoeError:
        return "model"


def _kind_of_adapter(source: Source) -> str:
    config = read_config(source.expert, source.file(CONFIG_FILE))
    return "mixture" if config.get("peft_type") == "MOLORA" else "adapter"


def inspect_adapter(
    name: str, location: str, view: BaseView | None, *, allow_base_mismatch: bool = False
) -> tuple[Inspection, ExpertSpec | None]:
    """A LoRA adapter, held against a base where there is one.

    Returns:
        What was found, and the expert's description; None if it cannot be mixed.
    """
    found = Inspection("adapter", name, location)
    try:
        source = find_source(name, location)
        config = read_config(name, source.file(CONFIG_FILE))
        found.facts["base"] = config.get("base_model_name_or_path") or "not named"
        check_config(name, config)
        if view is not None and not allow_base_mismatch:
            check_same_base(name, config, view)
        spec = spec_of(source, config)
        file = ExpertFile(spec, source.file(WEIGHTS_FILE))
        try:
            found.facts.update(_adapter_facts(spec, file.path))
            if view is None:
                found.notes.append("without a base its modules and shapes are not checked; pass --base")
            else:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    file.check_header(view)
                found.notes += [str(one.message) for one in caught]
        finally:
            file.close()
    except PeftMoeError as error:
        found.problems.append(str(error))
        return found, None
    return found, spec


def _adapter_facts(spec: ExpertSpec, path: str) -> dict[str, Any]:
    ranks: Counter[int] = Counter()
    dtypes: set[str] = set()
    targets: set[str] = set()
    scales: set[float] = set()
    size = 0
    for key, (dtype, shape) in tensor_headers(path).items():
        dtypes.add(dtype)
        size += FILE_BYTES.get(dtype, 1) * _numel(shape)
        if key.endswith("lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            ranks[shape[0]] += 1
            targets.add(module.rsplit(".", 1)[-1])
            scales.add(round(spec.scaling_in(module), 6))
    return {
        "modules": sum(ranks.values()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "scales": sorted(scales),
        "targets": sorted(targets),
        "dtypes": sorted(dtypes),
        "bytes": size,
    }


def tensor_headers(path: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a safetensors file that was found sound."""
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def inspect_model(
    name: str,
    location: str,
    base: Checkpoint | None,
    settings: Mapping[str, Any] | None = None,
    *,
    download: bool = False,
) -> tuple[Inspection, ExtractionPlan | None]:
    """A full model, and against a base: what its extraction would do.

    Returns:
        What was found, and the plan of the extraction; None without a base, or if it cannot be extracted.
    """
    found, settings = Inspection("model", name, location), settings or {}
    try:
        model = Checkpoint.open(location, download=download)
        found.facts.update(model_facts(model))
        if base is None:
            found.notes.append("with --base it is said what an extraction would do")
            return found, None
        dense = bool(settings.get("dense"))
        rule = RankRule(settings.get("rank"), settings.get("energy"), settings.get("max_rank", 64), dense)
        plan = plan_extraction(base, model, settings.get("target_modules"))
    except PeftMoeError as error:
        found.problems.append(str(error))
        return found, None
    found.facts.update(extraction_facts(plan, rule, str(settings.get("dtype", "auto"))))
    found.notes.append("it is made a LoRA adapter first; what it changed elsewhere is left out, and reported")
    return found, plan


def model_facts(model: Checkpoint) -> dict[str, Any]:
    """Of any full model."""
    return {
        "class": str((model.config.get("architectures") or ["?"])[0]),
        "numbers": sum(at.numel for at in model.tensors.values()),
        "dtype": model.dtype,
        "files": len({at.path for at in model.tensors.values()}),
        "bytes": model.num_bytes,
    }


def extraction_facts(plan: ExtractionPlan, rule: RankRule, dtype: str) -> dict[str, Any]:
    """Layers, upper bounds of the adapter, and memory of an extraction."""
    taken = plan.taken
    left_out = Counter(
        "linear, not targeted" if pair.kind == LINEAR else pair.kind for pair in plan.pairs if not pair.taken
    )
    wide = rule.dense or plan.model.dtype in ("F32", "F64")
    width = (4 if wide else 2) if dtype == "auto" else NAMED_DTYPES[dtype].itemsize
    ranks = [min(rule.limit, *pair.features) for pair in taken]
    result = sum(rank * sum(pair.features) for rank, pair in zip(ranks, taken, strict=True))
    return {
        "layers": len(taken),
        "rank by": "dense, all of each layer" if rule.dense else f"{rule.name}, at most {rule.limit}",
        "left out": dict(left_out),
        "bytes of the adapter, at most": result * width,
        # The factors are copied once when they are written.
        "memory to extract": max(_taken_work(plan) + _exact_work(plan, rule), _mapped(plan))
        + 2 * result * width,
    }


def _taken_work(plan: ExtractionPlan) -> int:
    """The difference in float32, and one tensor of a file beside it."""
    widths = [FILE_BYTES[side.tensors[key].dtype] for p in plan.taken for side, key in plan.sides(p)]
    return plan.largest * (4 + max(widths, default=4))


def _mapped(plan: ExtractionPlan) -> int:
    """Pages of the largest tensor that is only compared."""
    rest = [pair for pair in plan.pairs if not pair.taken]
    sizes = (sum(side.tensors[key].num_bytes for side, key in plan.sides(pair)) for pair in rest)
    return max(sizes, default=0)


def _exact_work(plan: ExtractionPlan, rule: RankRule) -> int:
    """What an exact decomposition needs beside its tensor: its copy, both factors, LAPACK's work."""
    sizes = [] if rule.dense else [pair.features for pair in plan.taken]
    exact = [o * i for o, i in sizes if min(o, i) <= EXACT_UP_TO or 4 * min(rule.limit, o, i) >= min(o, i)]
    return 4 * 4 * max(exact, default=0)


def inspect_mixture(name: str, location: str) -> Inspection:
    """A saved mixture: experts, router, what trains, what format."""
    found = Inspection("mixture", name, location)
    try:
        source = find_source(name, location)
        values = read_config(name, source.file(CONFIG_FILE))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = MoLoraConfig(**_known(values, found))
        found.notes += sorted({str(one.message) for one in caught})
        path = source.file(WEIGHTS_FILE)
        tensors = tensor_headers(path)
    except PeftMoeError as error:
        found.problems.append(str(error))
        return found
    except Exception as error:  # safetensors' and PEFT's own, of many kinds
        found.problems.append(f"{location} is no sound mixture: {error}")
        return found
    sizes = {key: _numel(shape) for key, (_, shape) in tensors.items()}
    routers = sum(count for key, count in sizes.items() if "molora_router" in key)
    experts = sum(count for key, count in sizes.items() if ".molora_A" in key or ".molora_B" in key)
    found.facts.update(
        {
            "base": config.base_model_name_or_path or "not named",
            "base precision": config.base_precision or "not recorded",
            "experts": [_expert_line(spec) for spec in config.specs()],
            "router": config.router,
            "scope, per": f"{config.router_scope}, {config.router_granularity}",
            "router's numbers": routers,
            "experts' numbers": experts,
            "trains": (routers if config.scorer.trainable else 0) + (experts if config.experts_train else 0),
            "bytes": sum(FILE_BYTES.get(dtype, 1) * _numel(shape) for dtype, shape in tensors.values()),
            "format": config.format_version,
        }
    )
    return found


def _known(values: dict[str, Any], found: Inspection) -> dict[str, Any]:
    fields = set(MoLoraConfig.__dataclass_fields__)
    unknown = sorted(set(values) - fields)
    if unknown:
        found.notes.append(f"fields that this version does not know: {', '.join(unknown)}")
    return {key: value for key, value in values.items() if key in fields and key != "target_parameters"}


def _expert_line(spec: ExpertSpec) -> str:
    rank = f"r={spec.r}" + (" and others" if spec.rank_pattern else "")
    return f"{spec.name} ({rank}, from {json.dumps(spec.source) if spec.source else 'fresh'})"
