"""Knowledge distillation: a student learns what a teacher answers."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modmoe.errors import NonFiniteError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)), mean over all samples.

    Args:
        student: (..., C) logits s.
        teacher: (..., C) logits t; no gradient flows into them.
        temperature: T, positive.
    Returns:
        () float.
    Raises:
        ValueError: on shapes that differ, or a temperature that is not positive.
    Source:
        Hinton et al. 2015, section 2: with T^2 the size of the gradient hardly depends on T.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits of one shape are needed, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    rows = (-1, student.shape[-1])
    log_student = F.log_softmax(student.reshape(rows) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach().reshape(rows) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor | tuple | list],
    epochs: int,
    lr: float = 1e-3,
    temperature: float = 2.0,
    alpha: float = 0.0,
) -> list[float]:
    """Train a student on :func:`distillation_loss`, plus alpha times the cross entropy with labels.

    AdamW with its defaults trains what is trainable of the student. The teacher is in evaluation and gets no
    gradients; the modes of all modules are as before afterwards. Nothing is drawn but by the models and the batches:
    seeded, it repeats itself.

    Args:
        student: inputs -> (..., C) logits; trained in place.
        teacher: the same; it shares no module with the student.
        batches: walked through once an epoch, a list or a DataLoader: inputs, or (inputs, labels (...) int64, ...).
            Labels of -100 do not count.
        epochs: at least 1.
        lr: of AdamW.
        temperature: T.
        alpha: weight of the cross entropy; above 0 each batch needs labels.
    Returns:
        The mean loss over the batches of each epoch.
    Raises:
        ValueError: on an argument out of range, shared modules, nothing trainable, missing labels, or an epoch without
            batches (a generator is empty after the first).
        NonFiniteError: on a loss that is NaN or infinite.
    """
    if epochs < 1 or alpha < 0:
        raise ValueError(f"epochs must be at least 1 and alpha at least 0, got {epochs} and {alpha}")
    mine, theirs = list(student.modules()), list(teacher.modules())
    if {id(module) for module in mine} & {id(module) for module in theirs}:
        raise ValueError("student and teacher share modules: copy the teacher before the student is made of it")
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing of the student is trainable")
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    modes = {module: module.training for module in (*mine, *theirs)}
    history = []
    try:
        student.train()
        teacher.eval()
        for epoch in range(epochs):
            losses = []
            for batch in batches:
                x, *rest = [batch] if isinstance(batch, Tensor) else batch
                if alpha and not rest:
                    raise ValueError("alpha > 0 needs batches of (inputs, labels)")
                with torch.no_grad():
                    target = teacher(x)
                logits = student(x)
                loss = distillation_loss(logits, target, temperature)
                if alpha:
                    loss = loss + alpha * F.cross_entropy(logits.reshape(-1, logits.shape[-1]), rest[0].reshape(-1))
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise NonFiniteError(f"the loss is {losses[-1]} in batch {len(losses)} of epoch {epoch + 1}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not losses:
                raise ValueError(f"no batches in epoch {epoch + 1}: a list or a DataLoader is needed")
            history.append(sum(losses) / len(losses))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return history
