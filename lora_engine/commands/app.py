"""python -m lora_engine app: a page in the browser that compares the captions of adapters."""

import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

import tyro

from lora_engine import cli
from lora_engine.captioning.adapted_captioner import load_captioners
from lora_engine.captioning.image_captioner import ImageCaptioner
from lora_engine.config import Range, check_ranges
from lora_engine.devices import disable_tf32, resolve_device, resolve_dtype, use_device
from lora_engine.features.precision import cast_weights

logger = logging.getLogger(__name__)

BASE = "base"
LOCAL = "127.0.0.1", "localhost", "::1"


@dataclass(frozen=True)
class AppConfig:
    """Flags of `app`."""

    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Adapter: a run folder, an adapter folder, or owner/name on the Hub. Repeat the flag to
    compare several adapters."""
    model: str | None = None
    """Base model: a folder or a Hub name. Default: the model that the adapters were trained on."""
    revision: str | None = None
    """Revision of a Hub model."""
    prompt: str | None = None
    """Words for the captions to continue, not repeated in them. Default: the prompt that each
    adapter was trained with, and for the base model that of the first adapter."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of matmuls. auto: bf16 (fp16 on older GPUs) on CUDA, otherwise fp32."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: CUDA if available."""
    force: bool = False
    """Accept a base model whose weights, configuration, tokenizer or preprocessor differ from those
    that an adapter was trained on."""
    host: str = LOCAL[0]
    """Address to listen on. With any other than the default, such as 0.0.0.0, other machines can
    use the page: there is no password and no encryption."""
    port: Annotated[int | None, Range(ge=1, le=65535)] = None
    """Port to listen on. Default: the first free one from 7860."""


def app(args: list[str]) -> int:
    """Serve the page until Ctrl-C -> exit status."""
    config = cli.parse(
        AppConfig, args, prog="python -m lora_engine app",
        description="Compare the captions of a base model and of adapters on a page in the "
                    "browser, and see what each word of a caption looked at.",
    )
    with serving(config) as url, suppress(KeyboardInterrupt):
        logger.info(f"page  {url}  (Ctrl-C stops it)")
        threading.Event().wait()
    return 0


@contextmanager
def serving(config: AppConfig) -> Iterator[str]:
    """Within the context the page is served; its temporary files are removed at the end -> URL.

    Raises ValueError without gradio, and as `load_captioners` does.
    """
    check_ranges(config)
    if find_spec("gradio") is None:  # importing it takes seconds
        raise ValueError(
            "app needs gradio: pip install -e '.[app]' in the clone of lora_engine (pip then "
            "replaces Pillow by an older version)"
        )
    captioners = _load(config)
    with tempfile.TemporaryDirectory(prefix="lora_engine_app_") as folder:
        # gradio reads these when it is imported, and at every upload.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from lora_engine.commands.app_page import LAUNCH, build

        page = build(captioners)
        if config.host not in LOCAL:
            logger.warning(
                f"--host {config.host}: anyone who can reach this machine can use the page"
            )
        try:
            _, url, _ = page.launch(server_name=config.host, server_port=config.port, **LAUNCH)
            yield url
        finally:
            page.close(verbose=False)


def _load(config: AppConfig) -> dict[str, ImageCaptioner]:
    """The base and each adapter on it, by name."""
    names = [BASE, *config.adapter]
    if len(set(names)) < len(names):
        raise ValueError(f"--adapter {' '.join(config.adapter)}: give each of them once")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    base, adapted = load_captioners(
        config.model, config.adapter, revision=config.revision, prompt=config.prompt,
        force=config.force,
    )
    use_device(device)
    disable_tf32()
    for captioner in (base, *adapted):
        cast_weights(captioner.model, dtype, "auto")
    return {
        name: ImageCaptioner(captioner, base, device=device, dtype=dtype)
        for name, captioner in zip(names, (base, *adapted))
    }
