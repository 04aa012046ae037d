"""What the package needs of a captioning model, whatever its family.

Axes: B images, N rows (B, or a multiple of it), T caption tokens, P image tokens, D width, V
vocabulary.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lora_engine.models.attention import KeyValueCache

# A captioning model, its encoder and its decoder are modules. Python's types have no intersections:
# for the type checker alone, the protocols below derive from nn.Module.
if TYPE_CHECKING:
    _Module = nn.Module
else:
    class _Module(Protocol):
        pass


@runtime_checkable
class Encoder(_Module, Protocol):  # type: ignore[misc]
    """A frozen image encoder."""

    image_size: tuple[int, int]
    """(height, width) of the pixels that it takes."""
    num_tokens: int
    """P."""

    @property
    def layers(self) -> nn.ModuleList:
        """Its blocks, which `--compile` compiles one by one."""

    def describe(self) -> dict[str, Any]:
        """What the features depend on besides the weights, as JSON values."""


@runtime_checkable
class Decoder(_Module, Protocol):  # type: ignore[misc]
    """A decoder whose linear layers LoRA adapts."""

    max_positions: int
    """The longest sequence, in tokens."""
    gradient_checkpointing: bool
    """Whether blocks are recomputed in the backward pass instead of keeping activations."""

    @property
    def layers(self) -> nn.ModuleList:
        """Its blocks, which `--compile` compiles one by one."""


@runtime_checkable
class CaptioningModel(_Module, Protocol):  # type: ignore[misc]
    """An image encoder and a text decoder, as an `nn.Module`.

    The children of the module are `decoder` and what computes features: the encoder, and anything
    between encoder and decoder. `head(hidden)` is `vocabulary(head_input(hidden))`; the loss takes
    the two apart so that it need not hold all logits.

    Linear layers within `lora_scope` have the names that they have in the checkpoint, so that
    targets, adapters and merged weights match by name.
    """

    lora_groups: Mapping[str, str]
    """Regular expressions over module paths, by group name. The groups "attention" and
    "feed_forward" are the default LoRA targets."""
    lora_scope: str
    """A regular expression over the module paths that LoRA may adapt."""
    tied_head: tuple[str, str]
    """Names of the weights of vocabulary head and embedding, which a checkpoint may tie."""
    fan_in_fan_out: bool
    """Whether the checkpoint stores adapted weights as (in, out), as transformers' Conv1D does."""

    @property
    def encoder(self) -> Encoder: ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def vocabulary(self) -> nn.Linear:
        """The vocabulary head; the loss calls it unless it is a plain `nn.Linear`."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Normalized pixels (B, 3, height, width) -> features (B, P, D). Frozen."""

    def decode(
        self, input_ids: Tensor, features: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Token ids (N, T) and features (B, P, D) -> hidden states (N, T, D). Trained by LoRA.

        The features of an image serve N / B consecutive rows, such as the beams of a search. With a
        cache, `input_ids` continue the tokens of earlier calls.
        """

    def head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> what `vocabulary` takes (..., D)."""

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
