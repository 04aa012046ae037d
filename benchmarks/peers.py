"""The peers that this engine is measured against: PEFT on transformers, from naive to expert.

    B0  published_loop   captions padded to 512 or 1024 tokens, padding counted in the loss; fp32
    B1  trainer          Hugging Face's Trainer, with loading processes
    B2  peft_loop        a plain loop, the encoder in every step; also with `sdpa`
    B3  feature_loop     B2 on features that were encoded once
    B4  compiled_loop    B3 with torch.compile and length buckets

Each builds a `Peer`; calling it trains one epoch. All adapt every linear layer of the decoder (rank
8, alpha 32) and clip gradients to norm 1; AdamW has learning rate 1e-4 and weight decay 0.01, and
is fused except in B0. Where transformers and PEFT leave a choice, it is made in the peers' favor:

- under bf16 frozen matrices are cast once, not in every step, and PEFT does not cast the inputs of
  its adapters to fp32 and back; adapters, norms and embeddings stay fp32;
- keys and values are not collected as for generation (transformers' `use_cache`);
- the loops B2 to B4 do not wait for the GPU within an epoch;
- pixels (uint8) and features are in host memory; with a GPU, a thread gathers the next batches in
  pinned memory while one trains. Only Trainer uses its own loader.

Axes: B batch, T caption tokens, P image tokens, D width, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionEncoderDecoderModel,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.rows import Rows
from lora_engine.data.batches import epoch_batches
from lora_engine.data.captions import IGNORED, collate_captions
from lora_engine.data.pixels import PixelSettings, normalize
from lora_engine.devices import autocast

RANK, ALPHA = 8, 32
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
BUCKETS = (8, 12, 20, 32, 64)  # T; few, because each is compiled. CC3M needs the first four

_TARGETS = {
    "blip": r"text_decoder\.bert\.encoder\.layer\..*\.(query|key|value|dense)",
    "vit_gpt2": r"decoder\.transformer\.h\..*\.(c_attn|q_attn|c_proj|c_fc)",
}
_IDS_NAME = {"blip": "input_ids", "vit_gpt2": "decoder_input_ids"}
_ENCODE_BATCH = 32
_NUM_AHEAD = 3  # batches gathered in advance


class Batch(NamedTuple):
    """`images` are uint8 pixels (B, 3, H, W) or features (B, P, D).

    `labels[b, t]` is the token that follows `input_ids[b, t]`, or -100; both (B, T).
    """

    images: Tensor
    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Peer:
    """A trainer to measure; calling it trains epoch `number` of all rows -> captions/s.

    `batch_of(row numbers)`, on the CPU, and `loss_of(batch)`, (), expose its step to tests.
    """

    model: peft.PeftModel
    batch_of: Callable[[Tensor], Batch]
    loss_of: Callable[[Batch], Tensor]
    epoch: Callable[[int], float]

    def __call__(self, number: int) -> float:
        return self.epoch(number)


def published_loop(
    folder: Path,
    rows: Rows,
    settings: PixelSettings,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int,
    lora_dropout: float = 0.0,
    seed: int = 0,
) -> Peer:
    """B0: the loop of the published script that the recipes are based on, for history.

    Captions are padded to the decoder's number of positions, and padding is a target. BLIP's labels
    are shifted here and again in its decoder, so it learns the token after the next; GPT-2's
    captions have neither start nor end. Always fp32, AdamW not fused. To do equal work it differs
    from the script in the adapted modules (48 of BLIP and 36 of ViT+GPT2 there), in learning rate
    and clipping, and in reading no image files.
    """
    captioner = _lora_model(folder, model, device, torch.float32, lora_dropout, seed)
    is_blip = model == "blip"
    num_positions, pad_id = (512, 0) if is_blip else (1024, 50256)

    def batch_of(indices: Tensor) -> Batch:
        ids = np.full((len(indices), num_positions), pad_id, dtype=np.int64)
        for i, row in enumerate(indices.tolist()):
            caption = rows.captions[row] if is_blip else rows.captions[row][1:-1]
            ids[i, : len(caption)] = caption
        images = _gather(torch.from_numpy(rows.pixels), rows, indices, device)
        return Batch(images, torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:]))

    def loss_of(batch: Batch) -> Tensor:
        return captioner(**_model_inputs(_to(batch, device), settings, model)).loss

    order = partial(_random_order, rows, batch_size, seed)
    return _peer(captioner, batch_of, loss_of, order, device, fused=False)


def trainer(
    folder: Path,
    rows: Rows,
    settings: PixelSettings,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    lora_dropout: float = 0.0,
    seed: int = 0,
    num_workers: int = 4,
) -> Peer:
    """B1: Hugging Face's Trainer; its worker processes pad captions and normalize pixels.

    The loss is computed here from the logits, as the mean over all labels, because shifting and
    scaling of transformers' own losses differ between versions. An epoch is timed from its first
    step, because Trainer restarts its processes at every call.
    """
    captioner = _lora_model(folder, model, device, dtype, lora_dropout, seed)
    clock = _Clock(device)
    hf_trainer = Trainer(
        model=captioner,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            label_names=["labels"],
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it reads the loss in every step
            disable_tqdm=True,
        ),
        data_collator=partial(_trainer_inputs, rows, settings, model),
        compute_loss_func=_loss_of_outputs,
        callbacks=[clock],
    )
    hf_trainer.remove_callback(PrinterCallback)
    # Otherwise it passes the number of labels to the model's forward, which ignores it.
    hf_trainer.model_accepts_loss_kwargs = False

    def loss_of(batch: Batch) -> Tensor:
        inputs = _model_inputs(_to(batch, device), settings, model)
        labels = inputs.pop("labels")
        with autocast(device, dtype):
            return _loss_of_outputs(captioner(**inputs), labels)

    def epoch(number: int) -> float:
        # A new order at every call, whatever Trainer's own shuffling does.
        hf_trainer.train_dataset = _permutation(rows, seed, number).tolist()
        hf_trainer.train()
        _wait_for(device)
        return len(rows.captions) / (time.perf_counter() - clock.begin_s)

    batch_of = partial(_padded_batch, rows, torch.from_numpy(rows.pixels), device)
    return Peer(captioner, batch_of, loss_of, epoch)


def peft_loop(
    folder: Path,
    rows: Rows,
    settings: PixelSettings,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    lora_dropout: float = 0.0,
    seed: int = 0,
    sdpa: bool = False,
) -> Peer:
    """B2: a plain loop with the encoder in every step; captions are padded to the batch's longest.

    The encoder is as transformers loads it: BLIP's eager, ViT's (and GPT-2) with SDPA. `sdpa`
    patches SDPA into BLIP's encoder, as an expert would do; ViT+GPT2 stays as it is.
    """
    captioner = _lora_model(folder, model, device, dtype, lora_dropout, seed)
    encoder, decoder = _halves(captioner, model)
    if sdpa:
        _patch_sdpa(encoder)

    def loss_of(batch: Batch) -> Tensor:
        pixels, input_ids, labels = _to(batch, device)
        with autocast(device, dtype):
            with torch.no_grad():
                features = encoder(pixel_values=normalize(pixels, settings)).last_hidden_state
            return _decoder_loss(decoder, features, input_ids, labels)

    batch_of = partial(_padded_batch, rows, torch.from_numpy(rows.pixels), device)
    order = partial(_random_order, rows, batch_size, seed)
    return _peer(captioner, batch_of, loss_of, order, device)


def feature_loop(
    folder: Path,
    rows: Rows,
    settings: PixelSettings,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    lora_dropout: float = 0.0,
    seed: int = 0,
    variant: Mapping[str, Any] = MappingProxyType({}),
) -> Peer:
    """B3: B2 on features that are encoded here once (with SDPA) and kept in `dtype`.

    `variant` are settings of LoraConfig; with `use_lorafa` the A matrices are frozen.
    """
    captioner = _lora_model(folder, model, device, dtype, lora_dropout, seed, variant)
    encoder, decoder = _halves(captioner, model)
    features = _encode(encoder, rows, settings, device, dtype)

    def loss_of(batch: Batch) -> Tensor:
        with autocast(device, dtype):
            return _decoder_loss(decoder, *_to(batch, device))

    batch_of = partial(_padded_batch, rows, features, device)
    order = partial(_random_order, rows, batch_size, seed)
    return _peer(captioner, batch_of, loss_of, order, device)


def compiled_loop(
    folder: Path,
    rows: Rows,
    settings: PixelSettings,
    *,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    lora_dropout: float = 0.0,
    seed: int = 0,
    buckets: Sequence[int] = BUCKETS,
    compile_options: Mapping[str, Any] | None = MappingProxyType({"dynamic": False}),
) -> Peer:
    """B4: B3 with decoder and loss compiled, on batches of a few shapes.

    Rows of similar length share a batch, in our engine's order, and are padded to the next of
    `buckets` (T); the last batch is filled up with rows without labels. Every shape is compiled
    here. `compile_options` are arguments of torch.compile, such as {"dynamic": False, "mode":
    "reduce-overhead"} for CUDA graphs; None compiles nothing.
    """
    captioner = _lora_model(folder, model, device, dtype, lora_dropout, seed)
    encoder, decoder = _halves(captioner, model)
    features = _encode(encoder, rows, settings, device, dtype)
    decoder_loss: Callable[..., Tensor] = partial(_decoder_loss, decoder)
    if compile_options is not None:
        decoder_loss = torch.compile(decoder_loss, **compile_options)

    def batch_of(indices: Tensor, num_tokens: int = 0) -> Batch:
        input_ids, labels = _collate(rows, indices)
        num_tokens = max(num_tokens, input_ids.shape[1])
        num_tokens = min((size for size in buckets if size >= num_tokens), default=num_tokens)
        missing = (0, num_tokens - input_ids.shape[1], 0, batch_size - len(indices))
        return Batch(
            _gather(features, rows, F.pad(indices, missing[2:]), device),
            F.pad(input_ids, missing),
            F.pad(labels, missing, value=IGNORED),
        )

    def loss_of(batch: Batch) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # otherwise the last step's loss could be kept
        with autocast(device, dtype):
            return decoder_loss(*_to(batch, device))

    def order(number: int) -> list[Tensor]:
        batches = epoch_batches(rows.lengths, batch_size=batch_size, seed=seed, epoch=number)
        return [torch.from_numpy(indices) for indices in batches]

    if compile_options is not None:
        shortest = torch.tensor([rows.lengths.argmin()])
        # The limit counts all peers of a process together; above it torch would run eagerly.
        with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True):
            for size in buckets:
                loss_of(batch_of(shortest, size)).backward()
                if size >= rows.lengths.max() - 1:
                    break
        captioner.zero_grad()
    return _peer(captioner, batch_of, loss_of, order, device)


def _lora_model(
    folder: Path,
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    dropout: float,
    seed: int,
    variant: Mapping[str, Any] = MappingProxyType({}),
) -> peft.PeftModel:
    """The checkpoint with new adapters, in training mode; `seed` also seeds torch."""
    is_blip = model == "blip"
    kind = BlipForConditionalGeneration if is_blip else VisionEncoderDecoderModel
    captioner = kind.from_pretrained(folder)
    _, decoder = _halves(captioner, model)
    decoder.config.use_cache = False
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(captioner, peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=_TARGETS[model],
        fan_in_fan_out=not is_blip,
        **{name: value for name, value in variant.items() if name != "use_lorafa"},
    ))
    if "use_lorafa" in variant:
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
        elif isinstance(module, (nn.Linear, nn.Conv2d, Conv1D)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    cast = parameter.detach().to(dtype)
                    setattr(module, name, nn.Parameter(cast, requires_grad=False))
    return adapted.to(device).train()


def _halves(captioner: nn.Module, model: str) -> tuple[Any, Any]:
    """Encoder and decoder of a captioner, adapted or not."""
    base: Any = captioner.get_base_model() if isinstance(captioner, peft.PeftModel) else captioner
    if model == "blip":
        return base.vision_model, base.text_decoder
    return base.encoder, base.decoder


def _patch_sdpa(encoder: nn.Module) -> None:
    """Patch SDPA into BLIP's vision attention; other encoders stay as they are."""

    def forward(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        num_rows, num_tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(num_rows, num_tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.projection(out.transpose(1, 2).reshape(num_rows, num_tokens, width)), None

    for module in encoder.modules():
        if type(module).__name__ == "BlipAttention":
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]


@torch.no_grad()
def _encode(
    encoder: Any, rows: Rows, settings: PixelSettings, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Features of every image, (number of images, P, D), on the CPU."""
    _patch_sdpa(encoder)
    features = []
    with autocast(device, dtype):
        for pixels in torch.from_numpy(rows.pixels).split(_ENCODE_BATCH):
            values = normalize(pixels.to(device), settings)
            features.append(encoder(pixel_values=values).last_hidden_state.to(dtype).cpu())
    return torch.cat(features)


def _decoder_loss(decoder: Any, features: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch on features (B, P, D) -> ()."""
    mask = None
    if decoder.config.model_type == "gpt2":
        # Without a mask, transformers checks in every step whether ids are padding and whether
        # captions are packed, and waits for the GPU. Padding comes last: a causal mask is enough.
        num_tokens = input_ids.shape[1]
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=input_ids.device)
        mask = mask.tril()[None, None]  # (1, 1, T, T)
    outputs = decoder(
        input_ids=input_ids, attention_mask=mask, encoder_hidden_states=features
    )
    return _loss_of_outputs(outputs, labels)


def _loss_of_outputs(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) -> (), with the signature that Trainer calls."""
    return F.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
    )


def _collate(rows: Rows, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Captions padded to the longest -> input_ids and labels (B, T)."""
    return collate_captions([rows.captions[i] for i in indices.tolist()], prompt_length=1, pad_id=0)


def _gather(images: Tensor, rows: Rows, indices: Tensor, device: torch.device) -> Tensor:
    """The images of some rows; for a GPU in pinned memory, so that the copy does not block."""
    chosen = torch.from_numpy(rows.image_of_row)[indices]
    out = torch.empty(
        (len(chosen), *images.shape[1:]), dtype=images.dtype, pin_memory=device.type == "cuda"
    )
    return torch.index_select(images, 0, chosen, out=out)


def _padded_batch(rows: Rows, images: Tensor, device: torch.device, indices: Tensor) -> Batch:
    return Batch(_gather(images, rows, indices, device), *_collate(rows, indices))


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(part.to(device, non_blocking=True) for part in batch))


def _model_inputs(batch: Batch, settings: PixelSettings, model: str) -> dict[str, Tensor]:
    """A batch as arguments of the whole model's forward."""
    return {
        "pixel_values": normalize(batch.images, settings),
        _IDS_NAME[model]: batch.input_ids,
        "labels": batch.labels,
    }


def _trainer_inputs(
    rows: Rows, settings: PixelSettings, model: str, indices: list[int]
) -> dict[str, Tensor]:
    """The collate function of Trainer's processes; Trainer pins the memory."""
    pixels = torch.from_numpy(rows.pixels)
    batch = _padded_batch(rows, pixels, torch.device("cpu"), torch.tensor(indices))
    return _model_inputs(batch, settings, model)


def _permutation(rows: Rows, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    return torch.randperm(len(rows.captions), generator=generator)


def _random_order(rows: Rows, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
    return _permutation(rows, seed, epoch).split(batch_size)


def _ahead(batch_of: Callable[[Tensor], Batch], order: Iterable[Tensor]) -> Iterator[Batch]:
    """Batches in order, gathered by a thread in advance."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: deque[Future[Batch]] = deque()
        for indices in order:
            waiting.append(thread.submit(batch_of, indices))
            if len(waiting) > _NUM_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _peer(
    captioner: peft.PeftModel,
    batch_of: Callable[[Tensor], Batch],
    loss_of: Callable[[Batch], Tensor],
    order: Callable[[int], Sequence[Tensor]],
    device: torch.device,
    *,
    fused: bool = True,
) -> Peer:
    """The loop of all peers except Trainer; `order(epoch)` gives the row numbers of its batches."""
    trainable = [p for p in captioner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused
    )

    def epoch(number: int) -> float:
        batches = order(number)
        _wait_for(device)
        begin_s = time.perf_counter()
        # On a CPU, a thread would only take time from training.
        for batch in (_ahead if device.type == "cuda" else map)(batch_of, batches):
            loss_of(batch).backward()
            nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait_for(device)
        return sum(map(len, batches)) / (time.perf_counter() - begin_s)

    return Peer(captioner, batch_of, loss_of, epoch)


class _Clock(TrainerCallback):
    """Records when Trainer begins an epoch's first step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin_s = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            _wait_for(self.device)
            self.begin_s = time.perf_counter()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
