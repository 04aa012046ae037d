r"""LoRA on the GPT-2 decoder of a ViT + GPT-2 captioner, on CC3M-like image-caption pairs.

The model is a VisionEncoderDecoderModel of https://arxiv.org/abs/2010.11929 and GPT-2; the data's
wording that of Conceptual Captions, https://aclanthology.org/P18-1238. The published run:

    python -m recipes.vit_gpt2_cc3m --train_data_path train.json --val_data_path val.json \
        --output_path runs/vit_gpt2 --epochs 100 --batch_size 16 --lr 1e-5 --seed 42

Without data paths the embedded demo runs instead: a tiny ViT + GPT-2 that ships with the package
and says "a red circle above a blue square" learns to speak like CC3M, in about a minute on a CPU.
"""

import sys
from dataclasses import replace

from lora_engine.cli import run
from lora_engine.commands.recipe import run_recipe
from lora_engine.config import TrainingConfig
from lora_engine.demo import captioner_folder

PUBLISHED = TrainingConfig(
    model="nlpconnect/vit-gpt2-image-captioning",
    epochs=100,
    batch_size=16,
    lr=1e-5,
    seed=42,
)

DEMO = replace(
    PUBLISHED,
    model=captioner_folder("vit_gpt2"),
    epochs=8,
    batch_size=32,
    lr=5e-3,
    warmup_steps=20,
    # A second thread saves a quarter on an idle machine, and costs minutes on a busy one: two spin
    # while they wait for each other (benchmarks/LOG.md).
    num_threads=1,
)


def main(args: list[str]) -> int:
    return run_recipe(
        args,
        name="vit_gpt2_cc3m",
        description=__doc__,
        family="vision-encoder-decoder",
        published=PUBLISHED,
        demo=DEMO,
    )


if __name__ == "__main__":
    sys.exit(run(main))
