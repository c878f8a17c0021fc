"""``check_router``: the contract of a scorer, for the built-in ones and for those of outsiders.

    from peft_moe.testing import check_router
    check_router("mine")  # registered with @register_router("mine")

It needs no test runner: a broken scorer raises :class:`RouterCheckError`, whose message names the
check and what was found. Letters: B batch, T sequence, I in, X experts plus the null expert.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .routers import Router, RouterSettings, scorer_class
from .routing.context import Routing, RoutingContext, routing_inputs
from .tuner.config.mixture import MoLoraConfig

WIDTH, EXPERTS, BATCH, LENGTH = 8, 3, 2, 5


class RouterCheckError(AssertionError):
    """A registered scorer breaks the contract; the message says which part of it."""


def check_router(name: str, *, seed: int = 0) -> list[str]:
    """Run every check on the scorer registered as ``name``.

    Args:
        name: as given to :func:`peft_moe.register_router`.
        seed: of the scorer's initial weights and of the inputs.

    Returns:
        The names of the checks that ran, in order.

    Raises:
        RouterCheckError: the first check that failed.
        PeftMoeError: there is no such scorer.
    """
    scorer_class(name)
    for title, check in CHECKS.items():
        torch.manual_seed(seed)
        try:
            check(name)
        except Exception as error:
            kind = "" if isinstance(error, RouterCheckError) else f"{type(error).__name__}: "
            raise RouterCheckError(f"router {name!r}, {title}: {kind}{error}") from error
    return list(CHECKS)


def _router(name: str, *, null: bool = False) -> Router:
    return Router(RouterSettings(name, num_experts=EXPERTS, null_expert=null, init_std=0.5), WIDTH).eval()


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, LENGTH)), WIDTH)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RouterCheckError(message)


def _close(found: Tensor, wanted: Tensor) -> bool:
    # float32, and sums that a batched product may take in another order.
    return found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)


def _decide(router: Router, x: Tensor) -> Routing:
    """A decision inside of a call that says all that a scorer may ask for."""
    batch, length = x.shape[:2]
    context = RoutingContext(
        shape=(batch, length),
        domains=torch.arange(batch) % EXPERTS,
        input_ids=torch.arange(batch * length).view(batch, length),
    )
    routing: Routing = router(x, context)
    return routing


def _logits(routing: Routing) -> Tensor:
    assert routing.logits is not None  # the selector hands on what was scored
    return routing.logits


def _tensors(router: Router) -> dict[str, Tensor]:
    return {key: value for key, value in router.state_dict().items() if isinstance(value, Tensor)}


def _check_shapes(name: str) -> None:
    for null in (False, True):
        router = _router(name, null=null)
        for shape in ((BATCH, LENGTH), (1, 1)):
            logits = router.scorer(_tokens(*shape))
            rows = (*shape, EXPERTS + null) if router.reads_input else (1, 1, EXPERTS + null)
            _require(
                tuple(logits.shape) == rows,
                f"forward() gave {tuple(logits.shape)} for x {(*shape, WIDTH)}, expected {rows} "
                f"(reads_input={router.reads_input}, null_expert={null}: use settings.num_columns)",
            )
            _require(bool(torch.isfinite(logits).all()), "forward() gave NaN or infinity for finite inputs")


def _check_dtypes(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        logits = _logits(_decide(_router(name).to(torch.bfloat16), _tokens().to(dtype)))
        _require(
            logits.dtype == wide,
            f"scores of {dtype} inputs are {logits.dtype}, expected {wide}: compute in the dtype of x, and "
            "give parameters `.to(x.dtype)`",
        )
    for key, value in _tensors(_router(name).to(torch.bfloat16)).items():
        narrow = value.is_floating_point() and value.dtype != torch.float32
        _require(not narrow, f"{key} is {value.dtype}, expected torch.float32")


def _check_determinism(name: str) -> None:
    router, x = _router(name), _tokens()
    kept = x.clone()
    twice = []
    for _ in range(2):
        if router.scorer.draws:
            torch.manual_seed(0)
        twice.append(_decide(router, x).gates)
    _require(
        torch.equal(*twice),
        "two calls in eval mode differ; draw noise in training mode only, or say so with draws = True",
    )
    _require(torch.equal(x, kept), "forward() changed its input in place")


def _check_token_independence(name: str) -> None:
    router, x = _router(name), _tokens()
    whole = _logits(_decide(router, x))
    if not router.reads_input:
        _require(
            torch.equal(_logits(_decide(router, _tokens())), whole),
            "reads_input is False, but the scores change",
        )
        return
    if router.scorer.draws or not router.reads_hidden:
        return  # what is drawn depends on how much was drawn before; a call is independent of its padding
    alone = torch.cat([_logits(_decide(router, x[b : b + 1])) for b in range(BATCH)])
    _require(_close(alone, whole), "a sequence's scores depend on the other sequences of its batch")
    longer = _logits(_decide(router, torch.cat([x, 9 * _tokens()], dim=1)))[:, :LENGTH]
    _require(_close(longer, whole), "a token's scores depend on later tokens, or on padding behind it")
    padded = _logits(_decide(router, torch.cat([9 * _tokens(), x], dim=1)))[:, LENGTH:]
    _require(_close(padded, whole), "a token's scores depend on earlier tokens, or on padding before it")


def _check_gradients(name: str) -> None:
    router = _router(name).train()
    parameters = dict(router.scorer.named_parameters())
    if not router.trainable:
        return
    _require(bool(parameters), "trainable is True, but there are no parameters; set trainable = False")
    weights = torch.linspace(-1, 2, EXPERTS)
    (_decide(router, _tokens()).gates * weights).sum().backward()  # type: ignore[no-untyped-call]  # untyped, torch's
    for key, value in parameters.items():
        reached = value.grad is not None and bool(value.grad.abs().max() > 0)
        _require(reached or not value.requires_grad, f"no gradient reaches parameter {key!r}")


def _check_state(name: str) -> None:
    router, x = _router(name), _tokens()
    foreign = sorted(set(router.state_dict()) - set(_tensors(router)))
    _require(not foreign, f"state_dict() holds {foreign}, which are no tensors and cannot be saved")
    other = _router(name)
    missing = other.load_state_dict(copy.deepcopy(router.state_dict()), strict=True)
    _require(not missing.missing_keys, f"state_dict() lacks {missing.missing_keys}")
    torch.manual_seed(0)
    copied = _decide(other, x).gates
    torch.manual_seed(0)
    _require(
        torch.equal(copied, _decide(router, x).gates),
        "a copy with the same state_dict() decides differently; keep what decides in parameters or buffers",
    )


class _Base(nn.Module):
    """Token ids through two linear layers: the smallest base that PEFT can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.embed(input_ids))))
        return out


def _check_saving(name: str) -> None:
    from peft import PeftModel, get_peft_model

    base, ids = _Base(), torch.randint(0, WIDTH, (BATCH, LENGTH))
    config = MoLoraConfig(
        experts=EXPERTS, router=name, target_modules=["first", "second"], init_weights=False, r=2
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()

    def outputs(some: nn.Module) -> Tensor:
        torch.manual_seed(0)  # for scorers that draw
        with routing_inputs(domains=torch.zeros(BATCH, dtype=torch.long)):
            out: Tensor = some(ids)
        return out

    wanted = outputs(model)
    _require(not torch.allclose(wanted, base(ids)), "a mixture with this router leaves the base as it is")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    _require(torch.equal(outputs(loaded), wanted), "a saved and loaded mixture gives other outputs")


CHECKS: dict[str, Callable[[str], None]] = {
    "shapes": _check_shapes,
    "dtypes": _check_dtypes,
    "determinism": _check_determinism,
    "token independence": _check_token_independence,
    "gradients": _check_gradients,
    "state_dict": _check_state,
    "saving": _check_saving,
}
