"""Captions from features: batched greedy search, sampling and beam search with key/value caches.

Greedy and beam search give the tokens of Hugging Face's `generate`; beam search follows its
vectorized implementation (huggingface/transformers, `generation/utils.py: _beam_search`), step by
step, at its defaults (`early_stopping=False`). Finished captions leave the batch.

Axes: B images, G beams, N sequences in the batch, T tokens so far, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.models import CaptioningModel
from lora_engine.models.attention import KeyValueCache

_NEVER = -1e9  # Hugging Face's score of what must not be chosen


class Sampling(NamedTuple):
    """How to draw tokens instead of taking the most probable one.

    Logits are divided by `temperature`; then a token is drawn from the fewest tokens whose
    probabilities sum to `top_p` (Holtzman et al., arXiv:1904.09751). A caption depends on `seed`
    and on its image's number, not on the other images in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    model: CaptioningModel,
    features: Tensor,
    *,
    prompt_ids: list[int],
    end_id: int,
    pad_id: int,
    max_new_tokens: int = 30,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Caption each image of `features` (B, P, D) -> token ids (B, T), starting with the prompt.

    Rows that end earlier are filled with `pad_id`. `prompt_ids` begin with the start token. No
    caption ends before `min_new_tokens`. The score of a beam is its log-probability divided by
    (number of new tokens) ** `length_penalty`. `numbers` are the images' numbers for `sampling`, by
    default 0 to B - 1. The model should be in evaluation mode.

    Raises ValueError if max_new_tokens or num_beams is below 1, if prompt and new tokens exceed the
    decoder's positions, and for sampling with more than one beam.
    """
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, num_beams={num_beams}: both must be 1 or more"
        )
    longest = len(prompt_ids) + max_new_tokens
    max_positions = model.decoder.max_positions
    if longest > max_positions:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} need "
            f"{longest} positions, but the decoder has {max_positions}"
        )
    if sampling is not None and num_beams > 1:
        raise ValueError(f"sampling together with num_beams={num_beams}: use one of them")
    prompt = torch.tensor([prompt_ids], device=features.device).expand(len(features), -1)
    next_logits = _NextLogits(model, longest, len(prompt_ids) + min_new_tokens, end_id)
    if num_beams > 1:
        return _beam_search(
            next_logits, features, prompt, end_id, pad_id, max_new_tokens, num_beams, length_penalty
        )
    choose: Callable[[Tensor, Tensor, int], Tensor] = _most_probable
    if sampling is not None:
        choose = _Sampler(sampling, numbers or range(len(features)), max_new_tokens)
    return _token_by_token(next_logits, features, prompt, choose, end_id, pad_id, max_new_tokens)


class _NextLogits:
    """Decodes new tokens (N, T) -> fp32 logits (N, V) of the token after the last, or their
    log_softmax. The key/value cache holds all tokens before."""

    def __init__(self, model: CaptioningModel, longest: int, first_end: int, end_id: int) -> None:
        self.model = model
        self.cache = KeyValueCache(longest)
        self.first_end = first_end  # the first position at which an end token is allowed
        self.end_id = end_id

    def __call__(
        self, new_tokens: Tensor, features: Tensor, *, log_softmax: bool = False
    ) -> Tensor:
        hidden = self.model.decode(new_tokens, features, self.cache)
        logits = self.model.head(hidden[:, -1]).float()
        if log_softmax:
            logits = F.log_softmax(logits, dim=-1)
        if self.cache.length < self.first_end:  # after log_softmax: other scores do not change
            logits[:, self.end_id] = -math.inf
        return logits


# --- greedy search and sampling --------------------------------------------------------------


def _token_by_token(
    next_logits: _NextLogits,
    features: Tensor,
    prompt: Tensor,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    end_id: int,
    pad_id: int,
    max_new: int,
) -> Tensor:
    """Extend each caption by what `choose` takes, until all have ended.

    `choose` maps logits (N, V), the images (N,) that they belong to, and the number of new tokens
    so far to token ids (N,).
    """
    tokens = F.pad(prompt, (0, max_new), value=pad_id)
    images = torch.arange(len(prompt), device=prompt.device)  # of unfinished captions
    new_tokens = prompt
    for num_new in range(max_new):
        position = prompt.shape[1] + num_new
        chosen = choose(next_logits(new_tokens, features), images, num_new)
        tokens[images, position] = chosen
        kept = (chosen != end_id).nonzero()[:, 0]
        if len(kept) == 0:
            break
        if len(kept) < len(images):
            images, chosen, features = images[kept], chosen[kept], features[kept]
            next_logits.cache.reorder(kept)
            next_logits.cache.keep_images(kept)
        new_tokens = chosen[:, None]
    return tokens[:, : position + 1]


def _most_probable(logits: Tensor, images: Tensor, num_new: int) -> Tensor:
    return logits.argmax(dim=-1)


class _Sampler:
    """Draws the next tokens: logits (N, V) of `images` (N,) -> token ids (N,)."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int], max_new_tokens: int) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        # (B, new tokens): the uniform random numbers of all draws.
        self.uniforms = torch.tensor(np.stack([
            np.random.default_rng([sampling.seed, number]).random(max_new_tokens, dtype=np.float32)
            for number in numbers
        ]))

    def __call__(self, logits: Tensor, images: Tensor, num_new: int) -> Tensor:
        probs, tokens = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        kept = _nucleus(probs, self.top_p)
        mass = (probs * kept).sum(dim=-1, keepdim=True)
        uniform = self.uniforms[images.cpu(), num_new].to(logits.device)[:, None]
        # Inverse transform sampling; rounding must not lead past the last kept token.
        rank = (probs.cumsum(dim=-1) < uniform * mass).sum(dim=-1, keepdim=True)
        return tokens.gather(1, rank.minimum(kept.sum(dim=-1, keepdim=True) - 1))[:, 0]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Which of `probs` (N, V), sorted from high to low, are the fewest that sum to `top_p`.

    Always the first of each row. Like any truncation of a sorted distribution (top-k), this is a
    mask (N, V) that is true for the beginning of each row.
    """
    return probs.cumsum(dim=-1) - probs < top_p


# --- beam search -----------------------------------------------------------------------------


class _Finished(NamedTuple):
    """The best finished captions of each image, best first; unused entries are not `exists`."""

    tokens: Tensor  # (B, G, T)
    scores: Tensor  # (B, G)
    lengths: Tensor  # (B, G), of new tokens
    exists: Tensor  # (B, G)

    def best_with(self, others: "_Finished", num_beams: int) -> "_Finished":
        """The `num_beams` best captions of both."""
        both = [torch.cat(pair, dim=1) for pair in zip(self, others)]
        best = both[1].topk(num_beams).indices
        return _Finished(*(_take(x, best) for x in both))

    def of_images(self, kept: Tensor) -> "_Finished":
        return _Finished(*(x[kept] for x in self))


def _beam_search(
    next_logits: _NextLogits,
    features: Tensor,
    prompt: Tensor,
    end_id: int,
    pad_id: int,
    max_new: int,
    num_beams: int,
    length_penalty: float,
) -> Tensor:
    """The best caption of each image among those that `num_beams` running beams lead to."""
    num_images, prompt_length = prompt.shape
    device = prompt.device
    shape = (num_images, num_beams)
    best_tokens = F.pad(prompt, (0, max_new), value=pad_id)
    longest = 0
    images = torch.arange(num_images, device=device)  # whose captions may still improve

    # At first all beams are equal, so only the first one may be continued.
    running = best_tokens[:, None].repeat(1, num_beams, 1)
    running_scores = torch.zeros(shape, device=device)
    running_scores[:, 1:] = _NEVER
    finished = _Finished(
        tokens=running.clone(),
        scores=torch.full(shape, _NEVER, device=device),
        lengths=torch.zeros(shape, dtype=torch.long, device=device),
        exists=torch.zeros(shape, dtype=torch.bool, device=device),
    )
    # Twice as many candidates as beams: even if the best half ends here, enough can continue.
    is_top_candidate = torch.arange(2 * num_beams, device=device) < num_beams

    new_tokens = prompt.repeat_interleave(num_beams, dim=0)
    for num_new in range(1, max_new + 1):
        position = prompt_length + num_new - 1
        log_probs = next_logits(new_tokens, features, log_softmax=True)
        scores = running_scores[:, :, None] + log_probs.unflatten(0, (-1, num_beams))
        vocab_size = scores.shape[-1]
        scores, chosen = scores.flatten(1).topk(2 * num_beams)  # (B, 2 G)
        parents, tokens = chosen // vocab_size, chosen % vocab_size
        candidates = _take(running, parents)
        candidates[:, :, position] = tokens
        ends = tokens == end_id
        if num_new == max_new:
            ends = torch.ones_like(ends)

        # The best candidates that do not end become the running beams.
        open_scores = scores + ends * _NEVER
        kept = open_scores.topk(num_beams).indices
        running, running_scores = _take(candidates, kept), _take(open_scores, kept)
        parents = _take(parents, kept)

        # Those that end compete with the captions that finished before.
        ends_now = ends & is_top_candidate
        finished = finished.best_with(
            _Finished(
                tokens=candidates,
                scores=scores / num_new**length_penalty + (~ends_now) * _NEVER,
                lengths=torch.full_like(tokens, num_new),
                exists=ends_now,
            ),
            num_beams,
        )

        # An image is done if no running beam can still beat its worst finished caption.
        worst = finished.scores.min(dim=1, keepdim=True).values
        worst = torch.where(finished.exists, worst, _NEVER)
        reachable = running_scores[:, :1] / num_new**length_penalty
        is_open = (reachable > worst).any(dim=1) & (num_new < max_new)
        kept, done = is_open.nonzero()[:, 0], (~is_open).nonzero()[:, 0]
        best_tokens[images[done]] = finished.tokens[done, 0]
        if len(done):
            longest = max(longest, int(finished.lengths[done, 0].max()))
        if len(kept) == 0:
            break
        next_logits.cache.reorder((num_beams * kept[:, None] + parents[kept]).flatten())
        new_tokens = running[kept, :, position].flatten()[:, None]
        if len(done):
            next_logits.cache.keep_images(kept)
            images, features = images[kept], features[kept]
            running, running_scores = running[kept], running_scores[kept]
            finished = finished.of_images(kept)

    return best_tokens[:, : prompt_length + longest]


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, n) of x (B, m, ...) -> (B, n, ...)."""
    indices = indices.reshape(*indices.shape, *[1] * (x.dim() - 2))
    return torch.take_along_dim(x, indices, dim=1)
