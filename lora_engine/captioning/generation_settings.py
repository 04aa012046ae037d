"""The settings of generation: what they mean, the values they accept, and which go together."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, get_type_hints

from lora_engine.config import Range, check_ranges
from lora_engine.other_names import FLAGS, REASONS, ours_for, reason_for


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How the tokens of a caption are chosen. The docstrings of the fields are the flags' --help.

    Names and meanings are those of transformers' `generate`, except that a temperature turns
    sampling on.
    """

    num_beams: Annotated[int, Range(ge=1, le=1000)] = 1
    """Number of beams; 1 is greedy search."""
    max_new_tokens: Annotated[int, Range(ge=1)] = 30
    """Maximum length of a caption, in tokens."""
    min_new_tokens: Annotated[int, Range(ge=0)] = 0
    """Minimum length of a caption, in tokens."""
    num_return_sequences: Annotated[int, Range(ge=1)] = 1
    """Captions per image: the best beams (at most --num_beams), or that many samples."""
    length_penalty: Annotated[float, Range(ge=-10, le=10)] = 1.0
    """Beams are ranked by log-probability / length ** length_penalty: values above 0 favor longer
    captions, values below 0 shorter ones."""
    repetition_penalty: Annotated[float, Range(ge=0.01, le=100)] = 1.0
    """Above 1, tokens that a caption or its prompt already contains become less probable; below 1,
    more probable (arXiv:1909.05858)."""
    no_repeat_ngram_size: Annotated[int, Range(ge=0)] = 0
    """Sequences of this many tokens occur at most once in a caption and its prompt; 0: no limit."""
    temperature: Annotated[float | None, Range(ge=1e-6)] = None
    """Sample tokens at this temperature instead of choosing the most probable ones."""
    top_k: Annotated[int, Range(ge=0)] = 0
    """Sample from this many most probable tokens; 0: from all (in transformers, 50 by default)."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose probabilities add up to this value
    (arXiv:1904.09751)."""
    seed: Annotated[int, Range(ge=0)] = 0
    """Random seed for sampling."""

    def check_generation(self, prefix: str = "") -> None:
        """Raises ValueError for a value of the wrong type or out of range, and for settings that do
        not go together.

        `prefix` comes before the settings' names: "--" for flags.
        """
        for field, kind in get_type_hints(GenerationSettings).items():
            value = getattr(self, field)
            if value is not None and not isinstance(value, Integral if kind is int else Real):
                expected = "a whole number" if kind is int else "a number"
                raise ValueError(f"{prefix}{field} is {value!r}; it must be {expected}")
        check_ranges(self, prefix)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"{prefix}min_new_tokens is {self.min_new_tokens}; it must be from 0 to "
                f"{prefix}max_new_tokens ({self.max_new_tokens})"
            )
        if self.temperature is None:
            for name, is_set in (("top_k", self.top_k > 0), ("top_p", self.top_p < 1)):
                if is_set:
                    raise ValueError(
                        f"{prefix}{name} is for sampling: give {prefix}temperature 1, too"
                    )
        elif self.num_beams > 1:
            raise ValueError(
                f"{prefix}temperature samples and {prefix}num_beams searches: give one of them"
            )
        if self.length_penalty != 1 and self.num_beams == 1:
            raise ValueError(
                f"{prefix}length_penalty ranks beams: give {prefix}num_beams 4, too, or no length "
                f"penalty"
            )
        if self.num_return_sequences > 1 and self.temperature is None:
            if self.num_beams == 1:
                raise ValueError(
                    f"{prefix}num_return_sequences is {self.num_return_sequences}, but greedy "
                    f"search finds one caption: give {prefix}num_beams "
                    f"{self.num_return_sequences}, or {prefix}temperature 1 to sample"
                )
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"{prefix}num_return_sequences is {self.num_return_sequences}; it must be at "
                    f"most {prefix}num_beams ({self.num_beams})"
                )

    @property
    def generation(self) -> "GenerationSettings":
        """These settings without the other flags of a command."""
        names = (field.name for field in dataclasses.fields(GenerationSettings))
        return GenerationSettings(**{name: getattr(self, name) for name in names})

    def changed(self, changes: str) -> "GenerationSettings":
        """These settings with changes such as "num_beams=4,length_penalty=0.5".

        Raises ValueError for a name that is not a setting, and for a value that is not a number.
        """
        kinds = get_type_hints(GenerationSettings)
        values: dict[str, float] = {}
        for change in changes.split(","):
            name, _, value = map(str.strip, change.partition("="))
            name = name.removeprefix("--").replace("-", "_")
            if name not in kinds:
                raise ValueError(f"there is no setting {name!r}; {_advice(name, kinds)}")
            is_int = kinds[name] is int
            try:
                values[name] = int(value) if is_int else float(value)
            except ValueError:
                kind = "a whole number" if is_int else "a number"
                raise ValueError(f"{name} is {value!r}; it must be {kind}") from None
        return dataclasses.replace(self.generation, **values)  # type: ignore[arg-type]

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are processed before tokens are chosen."""
        return (
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size > 0
            or self.min_new_tokens > 0
            or self.temperature is not None
        )


def _advice(name: str, known: Collection[str]) -> str:
    """What to use in place of a setting that does not exist."""
    if name == "do_sample":
        return "a temperature, such as temperature=1, turns sampling on"
    ours = ours_for(name, FLAGS, [f"--{setting}" for setting in known])
    if ours is not None:
        return f"it is {ours.removeprefix('--')} here"
    return reason_for(name, REASONS) or f"expected {', '.join(known)}"
