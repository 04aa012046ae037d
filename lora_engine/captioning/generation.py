"""Captions from features: batched greedy search, sampling and beam search with key/value caches.

Greedy and beam search give the tokens of Hugging Face's `generate`, and samples are drawn from its
distributions. Beam search follows its vectorized implementation (huggingface/transformers,
`generation/utils.py: _beam_search`), step by step, at its defaults (`early_stopping=False`).
Finished captions leave the batch.

Axes: B images, G captions of an image (beams or samples), N = B * G sequences in the batch, T
tokens so far, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.lora.layer import fixed_weights
from lora_engine.models import CaptioningModel
from lora_engine.models.attention import KeyValueCache
from lora_engine.terminal import counted

_NEVER = -1e9  # Hugging Face's score of what must not be chosen


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
    num_return_sequences: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Caption each image of `features` (B, P, D) -> token ids, starting with the prompt.

    `GenerationSettings` describes the settings. For the rest see `generate_tokens`.
    """
    settings = GenerationSettings(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_return_sequences=num_return_sequences,
        length_penalty=length_penalty,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return generate_tokens(
        model, features, settings,
        prompt_ids=prompt_ids, end_id=end_id, pad_id=pad_id, numbers=numbers,
    )


@torch.no_grad()
def generate_tokens(
    model: CaptioningModel,
    features: Tensor,
    settings: GenerationSettings = GenerationSettings(),
    *,
    prompt_ids: list[int],
    end_id: int,
    pad_id: int,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Caption each image of `features` (B, P, D) -> token ids (B * num_return_sequences, T).

    Captions of an image are consecutive rows, the best beam first. Rows start with the prompt, and
    those that end earlier are filled with `pad_id`. `prompt_ids` begin with the start token.
    Samples depend on the seed and the image's number in `numbers` (default: 0 to B - 1), not on the
    other images in the batch. The model should be in evaluation mode.

    Raises ValueError for settings out of range or that do not go together, and if prompt and new
    tokens exceed the decoder's positions.
    """
    settings.check_generation()
    longest = len(prompt_ids) + settings.max_new_tokens
    max_positions = model.decoder.max_positions
    if longest > max_positions:
        raise ValueError(
            f"a prompt of {counted(len(prompt_ids), 'token')} and "
            f"max_new_tokens={settings.max_new_tokens} need {longest} positions, but the decoder "
            f"has {max_positions}"
        )
    prompt = torch.tensor([prompt_ids], device=features.device).expand(len(features), -1)
    ids = {"end_id": end_id, "pad_id": pad_id}
    choose: Callable[[Tensor, Tensor, int], Tensor] = _most_probable
    if settings.temperature is not None:
        choose = _Sampler(settings, numbers or range(len(features)))
    with fixed_weights(model):
        if settings.num_beams > 1:
            return _beam_search(model, features, prompt, settings, **ids)
        return _token_by_token(model, features, prompt, settings, choose, **ids)


def _next_logits(
    model: CaptioningModel, new_tokens: Tensor, features: Tensor, cache: KeyValueCache
) -> Tensor:
    """fp32 logits (N, V) after new tokens (N, T); the cache holds all tokens before."""
    hidden = model.decode(new_tokens, features, cache)
    return model.head(hidden[:, -1]).float()


# --- what the settings make of logits --------------------------------------------------------


def process_logits(
    logits: Tensor, tokens: Tensor, settings: GenerationSettings, *, prompt_length: int, end_id: int
) -> Tensor:
    """The logits (N, V) from which the token after `tokens` (N, T), prompt included, is chosen.

    The steps are those of Hugging Face's processors, in their order. Beam search has them after its
    log_softmax, so that what they change is not shared out among the other tokens.
    """
    if settings.repetition_penalty != 1:
        seen = logits.gather(1, tokens)
        penalty = settings.repetition_penalty
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        logits = logits.scatter(1, tokens, seen)
    if 0 < settings.no_repeat_ngram_size <= tokens.shape[1]:
        repeats = _repeats(tokens, settings.no_repeat_ngram_size, logits)
        logits = logits.masked_fill(repeats, -math.inf)
    if tokens.shape[1] < prompt_length + settings.min_new_tokens:
        logits = logits.clone()
        logits[:, end_id] = -math.inf
    if settings.temperature is None:
        return logits
    logits = logits / settings.temperature
    if settings.top_k > 0:
        kept = logits.topk(min(settings.top_k, logits.shape[1])).values
        logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
    if settings.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    return logits


def _repeats(tokens: Tensor, size: int, logits: Tensor) -> Tensor:
    """Which tokens (N, V) would complete a sequence of `size` tokens that `tokens` (N, T) has."""
    ngrams = tokens.unfold(1, size, 1)  # (N, T - size + 1, size)
    begun = tokens[:, None, tokens.shape[1] + 1 - size :]
    matches = (ngrams[..., :-1] == begun).all(dim=-1)
    return torch.zeros_like(logits).scatter_add(1, ngrams[..., -1], matches.to(logits)) > 0


# --- greedy search and sampling --------------------------------------------------------------


def _token_by_token(
    model: CaptioningModel,
    features: Tensor,
    prompt: Tensor,
    settings: GenerationSettings,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    *,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """Extend each caption by what `choose` takes, until all have ended.

    `choose` maps logits (N, V), the images (B,) that they belong to, and the number of new tokens
    so far to token ids (N,).
    """
    num_captions = settings.num_return_sequences  # G: they share the features of their image
    prompt_length = prompt.shape[1]
    cache = KeyValueCache(prompt_length + settings.max_new_tokens)
    tokens = F.pad(prompt, (0, settings.max_new_tokens), value=pad_id)
    tokens = tokens[:, None].repeat(1, num_captions, 1)  # (B, G, T)
    captions = torch.arange(num_captions, device=prompt.device)  # numbers of an image's
    images = torch.arange(len(prompt), device=prompt.device)  # with unfinished captions
    is_open = torch.ones(tokens.shape[:2], dtype=torch.bool, device=prompt.device)  # of `images`
    new_tokens = prompt.repeat_interleave(num_captions, dim=0)
    for num_new in range(settings.max_new_tokens):
        position = prompt_length + num_new
        logits = _next_logits(model, new_tokens, features, cache)
        if settings.changes_logits:
            logits = process_logits(
                logits, tokens[images, :, :position].flatten(0, 1), settings,
                prompt_length=prompt_length, end_id=end_id,
            )
        chosen = choose(logits, images, num_new).unflatten(0, (-1, num_captions))
        if num_captions > 1:  # those that have ended wait for the others of their image
            tokens[images, :, position] = chosen.where(is_open, pad_id)
            chosen = chosen.where(is_open, end_id)
        else:
            tokens[images, :, position] = chosen
        is_open = chosen != end_id
        kept = is_open.any(dim=1).nonzero()[:, 0]
        if len(kept) == 0:
            break
        if len(kept) < len(images):
            images, chosen, features = images[kept], chosen[kept], features[kept]
            is_open = is_open[kept]
            cache.reorder((num_captions * kept[:, None] + captions).flatten())
            cache.keep_images(kept)
        new_tokens = chosen.reshape(-1, 1)
    return tokens[:, :, : position + 1].flatten(0, 1)


def _most_probable(logits: Tensor, images: Tensor, num_new: int) -> Tensor:
    return logits.argmax(dim=-1)


class _Sampler:
    """Draws the next tokens: logits (N, V) of captions of `images` (B,) -> token ids (N,)."""

    def __init__(self, settings: GenerationSettings, numbers: Sequence[int]) -> None:
        # (B, G, new tokens): the uniform random numbers of all draws.
        self.uniforms = torch.tensor(np.array([
            [
                np.random.default_rng([settings.seed, number, sample]).random(
                    settings.max_new_tokens, dtype=np.float32
                )
                for sample in range(settings.num_return_sequences)
            ]
            for number in numbers
        ]))

    def __call__(self, logits: Tensor, images: Tensor, num_new: int) -> Tensor:
        probs, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        uniform = self.uniforms[images.cpu(), :, num_new].to(logits.device).flatten()[:, None]
        # Inverse transform sampling; rounding must not lead past the last possible token.
        mass = probs.sum(dim=-1, keepdim=True)
        rank = (probs.cumsum(dim=-1) < uniform * mass).sum(dim=-1, keepdim=True)
        last = (probs > 0).sum(dim=-1, keepdim=True) - 1
        return tokens.gather(1, rank.minimum(last))[:, 0]


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
    model: CaptioningModel,
    features: Tensor,
    prompt: Tensor,
    settings: GenerationSettings,
    *,
    end_id: int,
    pad_id: int,
) -> Tensor:
    """The best captions of each image among those that `num_beams` running beams lead to."""
    num_beams, max_new = settings.num_beams, settings.max_new_tokens
    length_penalty, num_best = settings.length_penalty, settings.num_return_sequences
    num_images, prompt_length = prompt.shape
    cache = KeyValueCache(prompt_length + max_new)
    device = prompt.device
    shape = (num_images, num_beams)
    best_tokens = F.pad(prompt, (0, max_new), value=pad_id)[:, None].repeat(1, num_beams, 1)
    longest = 0
    images = torch.arange(num_images, device=device)  # whose captions may still improve

    # At first all beams are equal, so only the first one may be continued.
    running = best_tokens.clone()
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
        log_probs = F.log_softmax(_next_logits(model, new_tokens, features, cache), dim=-1)
        if settings.changes_logits:
            log_probs = process_logits(
                log_probs, running[:, :, :position].flatten(0, 1), settings,
                prompt_length=prompt_length, end_id=end_id,
            )
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
        best_tokens[images[done]] = finished.tokens[done]
        if len(done):
            longest = max(longest, int(finished.lengths[done, :num_best].max()))
        if len(kept) == 0:
            break
        cache.reorder((num_beams * kept[:, None] + parents[kept]).flatten())
        new_tokens = running[kept, :, position].flatten()[:, None]
        if len(done):
            cache.keep_images(kept)
            images, features = images[kept], features[kept]
            running, running_scores = running[kept], running_scores[kept]
            finished = finished.of_images(kept)

    return best_tokens[:, :num_best, : prompt_length + longest].flatten(0, 1)


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, n) of x (B, m, ...) -> (B, n, ...)."""
    indices = indices.reshape(*indices.shape, *[1] * (x.dim() - 2))
    return torch.take_along_dim(x, indices, dim=1)
