"""The distance between two models' next-token distributions. Letters: N tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distillation_kl(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """``T² · KL(p_teacher ‖ p_student)`` at temperature T, summed over tokens (arXiv 1503.02531).

    The forward direction: the student must cover whatever the teacher finds likely. T² keeps the size of
    the gradient independent of T.

    Args:
        teacher_NV: the teacher's logits; no gradient flows into them.
        student_NV: the student's.
        temperature: T.
    """
    teacher_NV = functional.log_softmax(teacher_NV.detach().float() / temperature, dim=-1)
    student_NV = functional.log_softmax(student_NV.float() / temperature, dim=-1)
    total = functional.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
    return temperature**2 * total
