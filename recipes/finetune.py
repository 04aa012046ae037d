r"""Fine-tune any supported captioner on your own pairs: the recipe to copy.

    python -m recipes.finetune --train_data_path train.json --output_path runs/mine
    python -m recipes.finetune --train_data_path train.json --output_path runs/mine \
        --model nlpconnect/vit-gpt2-image-captioning
"""

import sys

from lora_engine.cli import run
from lora_engine.commands.recipe import run_recipe
from lora_engine.config import TrainingConfig
from lora_engine.demo import demo_settings

SETTINGS = TrainingConfig(
    model="Salesforce/blip-image-captioning-base",
    # LoRA
    lora_rank=8,
    lora_alpha=32.0,
    lora_dropout=0.1,
    lora_targets=("attention", "feed_forward"),
    # schedule: linear warm-up to --lr, then linear decay to zero
    epochs=5,
    batch_size=32,
    lr=2e-4,
    warmup_steps=100,
    weight_decay=0.01,
    max_grad_norm=1.0,
    seed=42,
    # selection of the adapter, at a validation after every epoch
    best_by="cider_d",
    eval_captions=200,
    patience=3,
)

DEMO = demo_settings(SETTINGS, "blip")


def main(args: list[str]) -> int:
    return run_recipe(
        args, name="finetune", description=__doc__, settings=SETTINGS, demo=DEMO
    )


if __name__ == "__main__":
    sys.exit(run(main))
