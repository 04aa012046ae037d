"""The schema of a checkpoint's state.json, checked before anything of it is used.

A checker takes a JSON value and returns an error message, or None.
"""

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

from lora_engine.captioning.metrics import Scores
from lora_engine.config import unfit_setting

FORMAT = 2  # 1 had no best_adapter.safetensors

_MAX_COUNT = 2**53
_STEP = re.compile("0|[1-9][0-9]{0,15}")

Checker = Callable[[Any], str | None]


def state_complaint(state: Any, *, step: int) -> str | None:
    """What is wrong with a state.json of a checkpoint after `step` steps; None if nothing is."""
    complaint = _STATE(state)
    if complaint is not None:
        return complaint.removeprefix(".")
    if state["step"] != step:
        return f"step is {state['step']}, its folder's name says {step}"
    if state["total_steps"] < step:
        return f"total_steps is {state['total_steps']}, expected {step} or more"
    complaint = _validations_complaint(state["validations"], step)
    if complaint is None and state["settings"].get("ema_decay") is not None:
        average = state.get("average_validations")
        complaint = _VALIDATIONS(average) or _validations_complaint(average, step)
        if complaint is None and average["losses"].keys() != state["validations"]["losses"].keys():
            complaint = "is of other steps than validations"
        complaint = complaint and f"average_validations: {complaint}"
    if complaint is not None:
        return complaint
    if (state["compute_dtype"] == "torch.float16") != bool(state["scaler"]):
        return f"scaler is {state['scaler']}, but compute_dtype is {state['compute_dtype']}"
    steps = {"0", str(state["validations"]["best_step"])}
    if state["captions"].keys() != steps:
        found = reprlib.repr(list(state["captions"]))
        return f"captions are of steps {found}, expected {sorted(steps)}"
    return None


def _validations_complaint(validations: Any, step: int) -> str | None:
    losses, best_step = validations["losses"], validations["best_step"]
    if not {"0", str(best_step)} <= losses.keys() or any(int(name) > step for name in losses):
        return (
            f"validations.losses are of steps {reprlib.repr(list(losses))}; expected 0, best_step "
            f"({best_step}) and none after {step}"
        )
    if any(name not in losses for name in validations["scores"]):
        return "validations.scores are of other steps than validations.losses"
    return None


def _number(
    lowest: float = -1e300, highest: float = 1e300, *, finite: bool = True
) -> Checker:
    def check(value: Any) -> str | None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if lowest <= value <= highest or isinstance(value, float) and not finite:
                return None
        return f"is {reprlib.repr(value)}, expected a number from {lowest:g} to {highest:g}"

    return check


def _whole(lowest: int = 0, highest: int = _MAX_COUNT) -> Checker:
    def check(value: Any) -> str | None:
        if type(value) is int and lowest <= value <= highest:
            return None
        return f"is {reprlib.repr(value)}, expected a whole number from {lowest} to {highest}"

    return check


def _of_type(kind: type, name: str) -> Checker:
    return lambda value: (
        None if isinstance(value, kind) else f"is {reprlib.repr(value)}, expected {name}"
    )


def _one_of(*values: Any) -> Checker:
    return lambda value: (
        None if any(type(value) is type(v) and value == v for v in values)
        else f"is {reprlib.repr(value)}, expected one of {', '.join(map(str, values))}"
    )


def _optional(check: Checker) -> Checker:
    return lambda value: None if value is None else check(value)


def _list(check: Checker) -> Checker:
    def check_list(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"is {reprlib.repr(value)}, expected a list"
        return _first((f"[{index}]", check(item)) for index, item in enumerate(value))

    return check_list


def _tuple(*checks: Checker) -> Checker:
    def check_tuple(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) != len(checks):
            return f"is {reprlib.repr(value)}, expected a list of {len(checks)}"
        return _first(
            (f"[{index}]", check(item)) for index, (check, item) in enumerate(zip(checks, value))
        )

    return check_tuple


def _mapping(check: Checker, *, key: re.Pattern = re.compile(".*")) -> Checker:
    def check_mapping(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"is {reprlib.repr(value)}, expected an object"
        for name in value:
            if key.fullmatch(name) is None:
                return f"has a key {reprlib.repr(name)}, expected ones like {key.pattern}"
        return _first((f".{name}", check(item)) for name, item in value.items())

    return check_mapping


def _object(**checks: Checker) -> Checker:
    """An object with these keys and perhaps others, which are ignored."""
    def check_object(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"is {reprlib.repr(value)}, expected an object"
        missing = [name for name in checks if name not in value]
        if missing:
            return f"lacks {', '.join(missing)}"
        return _first((f".{name}", check(value[name])) for name, check in checks.items())

    return check_object


def _first(complaints: Iterable[tuple[str, str | None]]) -> str | None:
    for name, complaint in complaints:
        if complaint is not None:
            return f"{name}{'' if complaint.startswith(('.', '[')) else ' '}{complaint}"
    return None


def _scaler(value: Any) -> str | None:
    """torch's GradScaler: nothing where it is not enabled."""
    if value == {}:
        return None
    return _object(
        scale=_number(1e-30, 1e30), growth_factor=_number(1, 1e6), backoff_factor=_number(0, 1),
        growth_interval=_whole(1), _growth_tracker=_whole(),
    )(value)


_SECONDS = _number(0, 1e10)
_SCORES = _object(**{
    name: _whole() if hint is int else _optional(_number())
    for name, hint in get_type_hints(Scores).items()
})
_VALIDATIONS = _object(
    losses=_mapping(_number(finite=False), key=_STEP),
    scores=_mapping(_SCORES, key=_STEP),
    best_step=_whole(),
    num_worse=_whole(),
)
_STATE = _object(
    format=_one_of(1, FORMAT),
    step=_whole(),
    total_steps=_whole(1),
    settings=lambda value: unfit_setting(value) if isinstance(value, dict) else "is no object",
    fingerprints=_mapping(_of_type(str, "text")),
    compute_dtype=_one_of("torch.float32", "torch.bfloat16", "torch.float16"),
    scaler=_scaler,
    micro_batch_rows=_optional(_whole(1)),
    validations=_VALIDATIONS,
    captions=_mapping(
        _list(_tuple(_whole(), _of_type(str, "text"), _of_type(bool, "true or false"))), key=_STEP
    ),
    meter=_object(
        finite=_list(_tuple(_number(), _number())),
        num_non_finite=_whole(),
        num_overflows=_whole(),
        rate=_number(0),
        num_images=_whole(),
        waited_s=_SECONDS,
        interval_s=_SECONDS,
        training_s=_SECONDS,
    ),
    seconds=_SECONDS,
)
