"""The model card of a run's adapter: adapter/README.md, as the Hugging Face Hub reads it.

It is derived from the files of the run and contains no local paths, because adapter folders are
meant to be shared. Format: https://huggingface.co/docs/hub/model-cards.
"""

import json
import shlex
import shutil
from typing import Any

from lora_engine.captioning.metrics import SCORE_NAMES
from lora_engine.files import replaced_file
from lora_engine.lora.adapter import Adapter, read_adapter
from lora_engine.lora.initialization import CHANGES_WEIGHT
from lora_engine.models.families import family_of_class
from lora_engine.report.markdown import escape_markdown, table
from lora_engine.report.run_facts import variants
from lora_engine.report.run_folder import RunFolder
from lora_engine.report.run_record import is_score, read_records
from lora_engine.terminal import counted
from lora_engine.version import __version__

CARD_FILE = "README.md"
MAX_SAMPLES = 8

_LOCAL_BASE = "BASE_MODEL"  # placeholder in commands for a base that is not on the Hub

_SNIPPET = """\
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, {hugging_face_class}

base, adapter = {base!r}, {adapter!r}
model = {hugging_face_class}.from_pretrained(base{revision})
model = PeftModel.from_pretrained(model, adapter).eval()
processor = AutoImageProcessor.from_pretrained(base{revision})
tokenizer = AutoTokenizer.from_pretrained(base{revision})

image = Image.open("photo.jpg").convert("RGB")
pixel_values = processor(image, return_tensors="pt").pixel_values
{generate}
print(tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip())"""

_GENERATE = """\
tokens = model.generate(pixel_values=pixel_values, max_new_tokens=30)
start = 1  # after the start token"""


def write_model_card(folder: RunFolder) -> None:
    """Write README.md, and the loss curve that it shows, beside the run's best adapter.

    It describes the adapter as saved, whatever the run did afterwards.
    """
    if folder.loss_curve.exists():
        with replaced_file(folder.adapter / folder.loss_curve.name) as new:
            shutil.copyfile(folder.loss_curve, new)
    with replaced_file(folder.adapter / CARD_FILE) as new:
        # A caption may hold half of a surrogate pair, which UTF-8 cannot encode.
        new.write_text(model_card(folder), encoding="utf-8", errors="replace")


def model_card(folder: RunFolder) -> str:
    adapter = read_adapter(folder.adapter)
    config = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    base = adapter.base_on_hub
    # The Hub would take a name without an owner for one of its own models.
    name = config["push_to_hub"] if "/" in (config["push_to_hub"] or "") else None
    of = base or _base_class(adapter) or "a captioner"
    curve = (
        f'<img src="{folder.loss_curve.name}" width="480" alt="Training and validation loss">'
        if folder.loss_curve.exists() else ""
    )
    parts = [
        _front_matter(base, config["license"]),
        f"# {escape_markdown(name or f'LoRA adapter of {of}')}",
        f"A LoRA adapter ([arXiv:2106.09685](https://arxiv.org/abs/2106.09685)) for image "
        f"captioning, in PEFT's format, trained with lora_engine {__version__}.",
        _origin(adapter, environment),
        "## Scores",
        _scores(folder, adapter),
        curve,
        _samples(folder, adapter),
        "## Usage",
        "" if base else
        f"Replace `{_LOCAL_BASE}` below by the base model's folder or Hub name; its weights must "
        f"have the fingerprint above.",
        _snippet(adapter, name),
        f"Training labels: {escape_markdown(adapter.provenance['label_convention'])}. Captions "
        f"start from the decoder's own start token, in training and in generation.",
        _commands(adapter, name),
        "## Settings",
        _settings(adapter, config, environment),
        "## License",
        f"`{config['license']}`" if config["license"] else
        "No license has been chosen for this adapter.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str | None, license: str | None) -> str:
    # JSON strings are valid YAML.
    lines = ["library_name: peft", "pipeline_tag: image-to-text"]
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"license: {json.dumps(license)}"] if license else []
    return "\n".join(["---", *lines, "tags:", "- lora", "- image-captioning", "---"])


def _origin(adapter: Adapter, environment: dict[str, Any]) -> str:
    provenance, base = adapter.provenance, adapter.base_on_hub
    revision = adapter.config["revision"]
    at = f", revision {escape_markdown(revision)}" if revision else ""
    kind = _base_class(adapter)
    named = "a local folder"
    if base:
        named = f"[{escape_markdown(base)}](https://huggingface.co/{base}){at}"
    return table(["", ""], [
        ["base model", f"{named} (`{kind}`)" if kind else named],
        ["fingerprint of its weights", f"`{provenance['base_fingerprint']}`"],
        ["training data", _size(environment, "train")],
        ["fingerprint of the training data", f"`{provenance['data_fingerprint']}`"],
        ["validation data", _size(environment, "val")],
        *([["prompt", escape_markdown(adapter.prompt)]] if adapter.prompt else []),
    ])


def _size(environment: dict[str, Any], part: str) -> str:
    captions, images = (environment[f"num_{part}_{kind}"] for kind in ("captions", "images"))
    return f"{counted(captions, 'caption')} of {counted(images, 'image')}"


def _scores(folder: RunFolder, adapter: Adapter) -> str:
    """The validation loss and all scores, before training and with this adapter."""
    records = read_records(folder.metrics)
    validations = {r["step"]: r for r in records if r["event"] == "validation"}
    best_step = int(adapter.provenance["step"])
    first, best = validations[0], validations[best_step]
    last_step = max(record.get("step", 0) for record in records)
    rows = [
        [_score_name(name), _score(first.get(name)), _score(value)]
        for name, value in best.items()
        if (name == "loss" or is_score(name)) and isinstance(value, (int, float))
    ]
    of = f"step {best_step:,} of {last_step:,}, epoch {best['epoch']:.3g}"
    scores = table(["validation", "before training", f"this adapter ({of})"], rows)
    if best_step == 0:
        return f"Training improved nothing: this is the initial adapter.\n\n{scores}"
    return scores


def _score_name(name: str) -> str:
    return "loss (nats per token)" if name == "loss" else SCORE_NAMES.get(name, f"`{name}`")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:z.4f}"


def _samples(folder: RunFolder, adapter: Adapter) -> str:
    lines = read_records(folder.samples) if folder.samples.exists() else []
    best_step = int(adapter.provenance["step"])
    before = {line["image"]: line["caption"] for line in lines if line["step"] == 0}
    rows = [
        list(map(escape_markdown, (line["reference"], before[line["image"]], line["caption"])))
        for line in lines if line["step"] == best_step
    ]
    if not rows:
        return ""
    shown = table(["reference", "before training", "with this adapter"], rows[:MAX_SAMPLES])
    return f"Captions of validation images:\n\n{shown}"


def _base_class(adapter: Adapter) -> str | None:
    """The transformers class of the base model, if transformers has one."""
    return (adapter.config["auto_mapping"] or {}).get("base_model_class")


def _snippet(adapter: Adapter, name: str | None) -> str:
    """Code that captions with transformers and PEFT, where they have the base model's class."""
    hugging_face_class = _base_class(adapter)
    family = family_of_class(hugging_face_class)
    revision, prompt = adapter.config["revision"], adapter.prompt.rstrip()
    generate = _GENERATE if family else None
    if family and prompt:
        generate = family.generate_with_prompt
    if generate is None:
        return ""
    code = _SNIPPET.format(
        hugging_face_class=hugging_face_class,
        base=adapter.base_on_hub or _LOCAL_BASE,
        revision=f", revision={revision!r}" if revision else "",
        adapter=name or ".",
        generate=generate.format(prompt=prompt),
    )
    return f"```python\n{code}\n```"


def _commands(adapter: Adapter, name: str | None) -> str:
    """Shell commands for captioning and for further training with lora_engine."""
    base, revision = adapter.base_on_hub, adapter.config["revision"]
    family = family_of_class(_base_class(adapter))
    recipe = family.recipe if family else "finetune"
    folder = "adapter" if name else "."
    caption = ["python", "-m", "lora_engine", "caption", "--adapter", folder]
    train = ["python", "-m", f"recipes.{recipe}", "--init_adapter", folder]
    train += ["--model", base or _LOCAL_BASE]
    train += ["--revision", revision] if revision else []
    train += ["--prompt", adapter.prompt] if adapter.prompt else []
    caption += [] if base else ["--model", _LOCAL_BASE]
    commands = "\n".join([
        *([shlex.join(["hf", "download", name, "--local-dir", folder])] if name else []),
        f"{shlex.join(caption)} photo.jpg",
        f"{shlex.join(train)} --train_data_path train.json",
    ])
    here = "" if name else " from this folder"
    return f"To caption and to train further with lora_engine{here}:\n\n```bash\n{commands}\n```"


def _settings(adapter: Adapter, config: dict[str, Any], environment: dict[str, Any]) -> str:
    lora = adapter.config
    targets, modules = " ".join(config["lora_targets"]), len(lora["target_modules"])
    if config["init_adapter"] is not None:
        targets = "those of the initial adapter"
    is_converted = config.get("init_lora_weights") in CHANGES_WEIGHT
    twice = " (saved as plain LoRA of twice the trained rank)" if is_converted else ""
    batch = counted(config["batch_size"], "caption")
    if config["grad_accum_steps"] > 1:
        batch += f", {config['grad_accum_steps']} gradient accumulation steps"
    return table(["", ""], [
        ["rank", f"{lora['r']}{_others(lora['rank_pattern'])}{twice}"],
        ["alpha", f"{lora['lora_alpha']:g}{_others(lora['alpha_pattern'])}"],
        ["dropout", f"{lora['lora_dropout']:g}"],
        *([["variant", escape_markdown(", ".join(kinds))]] if (kinds := variants(config)) else []),
        ["targets", f"{escape_markdown(targets)} ({counted(modules, 'module')})"],
        ["peak learning rate", f"{config['lr']:g}"],
        ["schedule of the learning rate", config["lr_schedule"]],
        ["weight decay", f"{config['weight_decay']:g}"],
        ["epochs", f"at most {config['epochs']}"],
        ["batch", batch],
        ["precision", environment["compute_dtype"]],
        ["seed", str(config["seed"])],
    ])


def _others(pattern: dict[str, Any]) -> str:
    return ", others in adapter_config.json" if pattern else ""
