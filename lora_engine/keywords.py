"""Calls from Python: unknown keywords are answered with ours, and errors name keywords, not flags.
"""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from lora_engine.other_names import FLAGS, KEYWORDS, REASONS, ours_for, reason_for
from lora_engine.terminal import wording

P = ParamSpec("P")
R = TypeVar("R")

# A flag and its value after "="; or a command, which stays as it is.
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--(no_)?([a-z]\w*)(=[^\s,;)]+)?")


def known_keywords(
    config: type | None = None, **keywords: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function of the public API; its signature stays as it is.

    An unknown keyword raises a TypeError that names the one that does what another library's does,
    or close matches. Errors of settings, and what is logged to the console, name the function's
    parameters, not the flags of a command: `keywords` are the parameters whose flag has another
    name, by that name. A function that takes the fields of the dataclass `config` as `**settings`
    has them as parameters, too.
    """
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        defaults: dict[str, Any] = {}
        if config is not None:
            defaults = {field.name: field.default for field in dataclasses.fields(config)}
        defaults |= {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        settings = {name: name for name in defaults} | keywords
        switches = {name for name, default in defaults.items() if isinstance(default, bool)}

        def as_keyword(flag: re.Match) -> str:
            no, name, value = flag.groups()
            if name not in settings or no and name not in switches:
                return flag[0]
            if name in switches:
                value = value or f"={not no}"
            return f"`{settings[name]}{value or ''}`"

        def translated(text: Any) -> Any:
            return _FLAG.sub(as_keyword, text) if isinstance(text, str) else text

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if settings.get(name) != name:
                    raise TypeError(
                        f"{function.__qualname__}() got an unexpected keyword argument {name!r}; "
                        f"{translated(_advice_on(name, settings))}"
                    )
            before = wording.set(translated)
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                error.args = tuple(map(translated, error.args))
                if hasattr(error, "__notes__"):
                    error.__notes__ = list(map(translated, error.__notes__))
                raise
            finally:
                wording.reset(before)

        return call

    return decorate


def _advice_on(name: str, settings: Mapping[str, str]) -> str:
    """What to give instead of a keyword; `settings` are Python's names for them."""
    flags = [f"--{setting}" for setting in settings]
    ours = name if name in settings else (
        ours_for(name, KEYWORDS, settings) or ours_for(name, FLAGS, flags)
    )
    if ours is None:
        near = difflib.get_close_matches(name, settings, n=3, cutoff=0.7)
        found = " or ".join(dict.fromkeys(settings[setting] for setting in near))
        return reason_for(name, REASONS) or (
            f"did you mean {found}?" if near else "its docstring describes all of them"
        )
    setting, _, value = ours.removeprefix("--").partition(" ")
    keyword = settings[setting]
    if value:
        keyword += f"={value if value.isdigit() else repr(value)}"
    return f"it is {keyword} here"
