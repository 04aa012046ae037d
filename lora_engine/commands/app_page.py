"""The page of `app`: its layout, and what happens on a click. Needs gradio."""

import html
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import ImageOps

from lora_engine.captioning.attention_map import WordAttention, heat_map, on_patches
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.captioning.image_captioner import ImageCaptioner
from lora_engine.captioning.metrics import References, bleu
from lora_engine.data.image_files import SUFFIXES, is_image
from lora_engine.data.images import ImageError, open_image
from lora_engine.data.pixels import load_pixels
from lora_engine.report.gallery import thumbnail
from lora_engine.report.html import Markup, tag
from lora_engine.terminal import one_line

MAX_IMAGES = 32  # of one click
MAX_FILE_BYTES = 64 * 2**20
MAP_SIDE = 640  # pixels

# Lowest and highest value, and step.
CONTROLS = {
    "num_beams": (1, 10, 1),
    "max_new_tokens": (1, 64, 1),
    "min_new_tokens": (0, 64, 1),
    "length_penalty": (-2, 4, 0.1),
    "repetition_penalty": (0.5, 3, 0.05),
    "no_repeat_ngram_size": (0, 6, 1),
    "temperature": (0, 3, 0.05),
    "top_k": (0, 100, 1),
    "top_p": (0.05, 1, 0.05),
    "seed": (0, 1000, 1),
}
INFO = {
    "num_beams": "1: greedy search",
    "temperature": "above 0: sample (with num_beams 1)",
    "top_k": "of sampling; 0: all tokens",
    "top_p": "of sampling",
    "seed": "of sampling",
    "length_penalty": "with beams; above 1: longer captions",
    "no_repeat_ngram_size": "0: no limit",
}
NOTE = """Scores of single images are coarse: BLEU-4 is 0 without four words in a row of a
reference. CIDEr-D weights words by how rare they are among the references of all images here: for
one image it is undefined, for a few it says little. lora_engine evaluate scores a data set."""
CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 16px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px; }
.card img { width: 100%; height: 180px; object-fit: contain; }
.card p, .card dl, .card dd { margin: 6px 0 0; overflow-wrap: anywhere; }
.card dt { margin-top: 8px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.card .score { display: block; font-size: 12px; font-variant-numeric: tabular-nums; }
"""
_FONTS = "system-ui", "sans-serif"
# Nothing is loaded from, sent to, or recorded at another place.
LAUNCH: dict[str, Any] = {
    "share": False, "prevent_thread_lock": True, "quiet": True, "ssr_mode": False, "pwa": False,
    "mcp_server": False, "enable_monitoring": False, "run_history": False, "footer_links": [],
    "max_file_size": MAX_FILE_BYTES, "state_session_capacity": 100, "css": CSS,
    "theme": gr.themes.Base(font=_FONTS, font_mono=("ui-monospace", "monospace")),
}

Rows = list[dict[str, Any]]  # {"image": name, "path", "captions", "scores": each by captioner}


def build(captioners: dict[str, ImageCaptioner]) -> gr.Blocks:
    """The page for captioners of one base model, by name; the first is the base."""
    events = _Events(captioners)
    with gr.Blocks(
        title="lora_engine", analytics_enabled=False, delete_cache=(600, 3600)
    ) as page:
        rows = gr.State([])
        with gr.Row():
            with gr.Column(min_width=320):
                with gr.Tab("Images"):
                    files = gr.File(
                        label=f"Images, at most {MAX_IMAGES}", file_count="multiple",
                        file_types=sorted(SUFFIXES), height=160,
                    )
                with gr.Tab("Folder"):
                    folder = gr.File(label="A folder of images", file_count="directory", height=160)
                references = gr.Textbox(
                    label="Reference captions (optional)", lines=2,
                    placeholder="Of one image: one or more lines. Of several: one line per image.",
                )
                with gr.Accordion("Generation settings", open=False):
                    controls = {
                        name: gr.Slider(
                            low, high, getattr(GenerationSettings(), name) or low, step=step,
                            label=name, info=INFO.get(name),
                        )
                        for name, (low, high, step) in CONTROLS.items()
                    }
                button = gr.Button("Caption", variant="primary")
            with gr.Column(min_width=320, scale=2):
                cards = gr.HTML(label="Captions")
                results = gr.JSON(visible=False)
        gr.Markdown("### What a word looked at")
        with gr.Row():
            with gr.Column(min_width=320):
                image = gr.Dropdown([], label="Image")
                captioner = gr.Radio(list(captioners), label="Captioner", value=[*captioners][-1])
                word = gr.Radio([], label="Word")
                layer, head = (
                    gr.Dropdown(["mean", *map(str, range(1, count + 1))], value="mean", label=label)
                    for label, count in (("Layer", len(events.base.model.decoder.layers)),
                                         ("Head", events.num_heads()))
                )
            with gr.Column(min_width=320, scale=2):
                attention = gr.Image(
                    label="Cross-attention", format="png", interactive=False, height=420,
                    buttons=["download", "fullscreen"],  # "share" would send it to a website
                )
                share = gr.Markdown()
        # One event at a time: `open_image` is for one thread.
        shown: Any = {"concurrency_id": "model", "concurrency_limit": 1}
        hidden = shown | {"api_visibility": "private"}
        of_word = [rows, image, captioner, word, layer, head]
        of_caption = {"inputs": [rows, image, captioner], "outputs": word}
        of_map = {"fn": events.show_map, "inputs": of_word, "outputs": [attention, share]}
        button.click(
            events.caption, [files, folder, references], [rows, cards, results, image],
            inputs_kwargs=controls, api_name="caption", **shown,
        ).success(events.show_words, **of_caption, **hidden).success(**of_map, **hidden)
        captioner.input(events.show_words, **of_caption, **hidden).success(**of_map, **hidden)
        image.input(events.show_words, **of_caption, api_name="words", **shown).success(
            **of_map, **hidden
        )
        for chosen in (layer, head):
            chosen.input(**of_map, **hidden)
        word.input(**of_map, api_name="heat_map", **shown)
    return page


class _Events:
    """What the page's events call, with captioners by name."""

    def __init__(self, captioners: dict[str, ImageCaptioner]) -> None:
        self.captioners = captioners
        self.base = next(iter(captioners.values()))
        # Another word, layer or head of the same caption needs no pass of the model.
        self.word_attention = lru_cache(maxsize=8)(
            lambda path, name, caption: captioners[name].word_attention(path, caption)
        )

    def num_heads(self) -> int:
        """Heads of the decoder's cross-attention."""
        blank = np.zeros((*self.base.pixels.size, 3), dtype=np.uint8)
        return self.base.word_attention(blank, "a").probs[0].shape[1]

    def caption(
        self, files: list[str] | None, folder: list[str] | None, references: str, **values: float
    ) -> tuple[Rows, str, Rows, Any]:
        with _shown_errors():
            settings: dict[str, Any] = values | {"temperature": values["temperature"] or None}
            GenerationSettings(**settings).check_generation()
            paths = [*(files or []), *sorted(path for path in folder or [] if is_image(path))]
            if not paths:
                raise ValueError("no images: choose image files, or a folder that has some")
            if len(paths) > MAX_IMAGES:
                raise ValueError(f"{len(paths)} images: choose at most {MAX_IMAGES}")
            texts = _references(references, len(paths))
            rows: Rows = []
            kept = []
            for number, path in enumerate(paths):
                row: dict[str, Any] = {
                    "image": os.path.basename(path), "path": path, "captions": {}
                }
                try:
                    load_pixels(path, self.base.pixels)
                except ImageError as error:
                    gr.Warning(html.escape(f"{row['image']}: {error.reason}"))
                    continue
                rows.append(row)
                kept.append(number)
            if not rows:
                raise ValueError("none of the images could be read")
            for name, captioner in self.captioners.items():
                captions = captioner.caption([row["path"] for row in rows], **settings)
                for row, caption in zip(rows, captions):
                    row["captions"][name] = caption
            if texts:
                _score(rows, [texts[number] for number in kept])
        results = [{key: row[key] for key in row if key != "path"} for row in rows]
        choices = [(row["image"], number) for number, row in enumerate(rows)]
        return rows, _cards(rows).source, results, gr.Dropdown(choices, value=0)

    def show_words(self, rows: Rows, image: int | None, captioner: str) -> Any:
        """The words to choose from, the first of them chosen."""
        with _shown_errors():
            words = self._attention(rows, image, captioner).words
        choices = [(word, number) for number, word in enumerate(words)]
        return gr.Radio(choices, value=0 if words else None)

    def show_map(
        self, rows: Rows, image: int | None, captioner: str, word: int | None, layer: str, head: str
    ) -> tuple[Any, str]:
        with _shown_errors():
            found = self._attention(rows, image, captioner)
            if word is None or not 0 <= word < len(found.words):
                raise ValueError("no word chosen: choose one of the caption's words")
            probs = found.probs[word]  # (L, H, P)
            for choice in (layer, head):
                probs = probs.mean(dim=0) if choice == "mean" else probs[int(choice) - 1]
            patches = on_patches(probs, self.base.model.encoder)
            path = rows[image or 0]["path"]
            shown = ImageOps.contain(open_image(path), (MAP_SIDE, MAP_SIDE))
            text = (
                f"Strongest patch: {patches.max():.1%} of the attention; if it were even, every "
                f"image token would have {1 / len(probs):.1%}. Class tokens, which have no place "
                f"in the image, have {probs.sum() - patches.sum():.1%}."
            )
            return heat_map(shown, patches, self.base.pixels), text

    def _attention(self, rows: Rows, image: int | None, captioner: str) -> WordAttention:
        if not rows or image is None:
            raise ValueError("no caption yet: choose images and click Caption")
        row = rows[image]
        return self.word_attention(row["path"], captioner, row["captions"][captioner])


def _references(text: str, num_images: int) -> list[list[str]]:
    """The references of each image; none at all if nothing is typed."""
    lines = [line for line in text.splitlines() if line.strip()]
    if num_images == 1 and lines:
        return [lines]
    if lines and len(lines) != num_images:
        raise ValueError(
            f"{len(lines)} reference captions for {num_images} images: give one line per image, in "
            f"their order, or none"
        )
    return [[line] for line in lines]


def _score(rows: Rows, texts: Sequence[Sequence[str]]) -> None:
    """Add the scores of each caption to the rows."""
    references = References(texts)
    for row in rows:
        row["scores"] = {}
    for name in rows[0]["captions"]:
        scores = references.score([row["captions"][name] for row in rows])
        for number, row in enumerate(rows):
            row["scores"][name] = {
                "BLEU-1": round(float(bleu(scores.bleu_counts)[number, 0]), 3),
                "BLEU-4": round(float(scores.bleu_4[number]), 3),
                "ROUGE-L": round(float(scores.rouge_l[number]), 3),
            }
            if len(rows) > 1:  # for a single image it is 0 by definition
                row["scores"][name]["CIDEr-D"] = round(float(scores.cider_d[number]), 3)


def _cards(rows: Rows) -> Markup:
    """A card for each image: the captions of all captioners, with their scores."""
    cards = []
    for row in rows:
        entries = []
        for name, caption in row["captions"].items():
            scores = row.get("scores", {}).get(name, {})
            line = " · ".join(f"{score} {value:.3f}" for score, value in scores.items())
            entries += [tag("dt", name), tag("dd", caption, tag("span", line, class_="score"))]
        image = thumbnail(row["path"])
        cards.append(tag("article", image, tag("p", row["image"]), tag("dl", *entries),
                         class_="card"))
    note = [tag("p", NOTE)] if "scores" in rows[0] else []
    return tag("div", tag("div", *cards, class_="cards"), *note)


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Within the context, people's mistakes become messages in the page."""
    try:
        yield
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        raise gr.Error(html.escape(one_line(error)), print_exception=False) from None
