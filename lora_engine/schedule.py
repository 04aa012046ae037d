"""The learning-rate curve."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (1 to total_steps): linear warm-up, then linear decay.

    It rises to `peak` at step `warmup_steps`, is `peak` again at the step after it, and falls
    towards zero, which it would reach one step after the last: every step learns something.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    return peak * (total_steps - step + 1) / max(total_steps - warmup_steps, 1)
