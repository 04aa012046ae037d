"""Captions from features: batched greedy and beam search with key/value caches.

Both give the tokens of Hugging Face's `generate`; beam search follows its vectorised rewrite
(huggingface/transformers, `generation/utils.py: _beam_search`), step by step, at its defaults
(`early_stopping=False`).

Axes: B images, G beams, T tokens so far, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.models import CaptionerBody
from lora_engine.models.attention import KeyValueCache

_NEVER = -1e9  # Hugging Face's score of what must not be chosen


@torch.no_grad()
def generate(
    model: CaptionerBody,
    features: Tensor,
    *,
    prompt_ids: list[int],
    end_id: int,
    pad_id: int,
    max_new_tokens: int = 30,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Tensor:
    """Caption each image of `features` (B, P, D) -> token ids (B, T), prompt first.

    Rows that ended earlier are filled with `pad_id`. `prompt_ids` begin with the start token. A
    beam's score is its log-probability divided by (number of new tokens) ** `length_penalty`.
    The model should be in evaluation mode.

    Raises ValueError if prompt and new tokens outgrow the decoder's positions.
    """
    longest = len(prompt_ids) + max_new_tokens
    if max_new_tokens < 1 or num_beams < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, num_beams={num_beams}: both must be 1 or more"
        )
    max_positions = model.decoder.max_positions
    if longest > max_positions:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} need "
            f"{longest} positions, but the decoder has {max_positions}"
        )
    prompt = torch.tensor([prompt_ids], device=features.device).expand(len(features), -1)
    if num_beams == 1:
        return _greedy(model, features, prompt, end_id, pad_id, max_new_tokens)
    return _beam_search(
        model, features, prompt, end_id, pad_id, max_new_tokens, num_beams, length_penalty
    )


def _next_logits(
    model: CaptionerBody, input_ids: Tensor, features: Tensor, cache: KeyValueCache
) -> Tensor:
    """(N, T new tokens) -> fp32 logits (N, V) of the token after the last one."""
    hidden = model.decode(input_ids, features, cache)
    return model.head(hidden[:, -1]).float()


def _greedy(
    model: CaptionerBody, features: Tensor, prompt: Tensor, end_id: int, pad_id: int, max_new: int
) -> Tensor:
    cache = KeyValueCache()
    tokens = prompt
    new_tokens = prompt
    is_finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new):
        chosen = _next_logits(model, new_tokens, features, cache).argmax(dim=-1)
        chosen = torch.where(is_finished, pad_id, chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        is_finished |= chosen == end_id
        if is_finished.all():
            break
        new_tokens = chosen[:, None]
    return tokens


def _beam_search(
    model: CaptionerBody,
    features: Tensor,
    prompt: Tensor,
    end_id: int,
    pad_id: int,
    max_new: int,
    num_beams: int,
    length_penalty: float,
) -> Tensor:
    num_images, prompt_length = prompt.shape
    device = prompt.device
    shape = (num_images, num_beams)
    cache = KeyValueCache()

    # Running beams and the best finished ones, each with its score. At first all beams are the
    # same, so that only the first one may be continued.
    running = torch.full((*shape, prompt_length + max_new), pad_id, device=device)
    running[:, :, :prompt_length] = prompt[:, None]
    running_scores = torch.zeros(shape, device=device)
    running_scores[:, 1:] = _NEVER
    finished = running.clone()
    finished_scores = torch.full(shape, _NEVER, device=device)
    finished_lengths = torch.zeros(shape, dtype=torch.long, device=device)
    is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
    may_improve = torch.ones((num_images, 1), dtype=torch.bool, device=device)
    # Twice as many candidates as beams: even if the best ones all end here, as many go on.
    is_top_candidate = torch.arange(2 * num_beams, device=device) < num_beams

    new_tokens = prompt.repeat_interleave(num_beams, dim=0)
    for num_new in range(1, max_new + 1):
        position = prompt_length + num_new - 1
        log_probs = F.log_softmax(_next_logits(model, new_tokens, features, cache), dim=-1)
        scores = running_scores[:, :, None] + log_probs.unflatten(0, shape)
        vocab_size = scores.shape[-1]
        scores, chosen = scores.flatten(1).topk(2 * num_beams)  # (B, 2 G)
        parents, tokens = chosen // vocab_size, chosen % vocab_size
        candidates = _take(running, parents)
        candidates[:, :, position] = tokens
        ends = tokens == end_id
        if num_new == max_new:
            ends = torch.ones_like(ends)

        # Those that go on.
        open_scores = scores + ends * _NEVER
        kept = open_scores.topk(num_beams).indices
        running, running_scores = _take(candidates, kept), _take(open_scores, kept)

        # Those that end now and are better than what has finished before.
        ends_now = ends & is_top_candidate
        end_scores = scores / num_new**length_penalty
        end_scores = end_scores + (~may_improve) * _NEVER + (~ends_now) * _NEVER
        lengths = torch.full_like(tokens, num_new)
        best = torch.cat([finished_scores, end_scores], dim=1).topk(num_beams).indices
        finished = _take(torch.cat([finished, candidates], dim=1), best)
        finished_scores = _take(torch.cat([finished_scores, end_scores], dim=1), best)
        finished_lengths = _take(torch.cat([finished_lengths, lengths], dim=1), best)
        is_finished = _take(torch.cat([is_finished, ends_now], dim=1), best)

        # Stop where no running beam could still beat the worst finished one.
        worst = torch.where(is_finished, finished_scores.min(dim=1, keepdim=True).values, _NEVER)
        reachable = running_scores[:, :1] / num_new**length_penalty
        may_improve = may_improve & (reachable > worst).any(dim=1, keepdim=True)
        if not may_improve.any() or ends.all():
            break
        first_rows = num_beams * torch.arange(num_images, device=device)[:, None]
        cache.reorder((first_rows + _take(parents, kept)).flatten())
        new_tokens = running[:, :, position].flatten()[:, None]

    return finished[:, 0, : prompt_length + int(finished_lengths[:, 0].max())]


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, n) of x (B, m, ...) -> (B, n, ...)."""
    indices = indices.reshape(*indices.shape, *[1] * (x.dim() - 2))
    return torch.take_along_dim(x, indices, dim=1)
