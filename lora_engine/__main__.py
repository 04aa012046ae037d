"""Train captioners and use them: python -m lora_engine VERB, or lora-engine VERB.

torchrun --nproc_per_node 2 -m lora_engine VERB splits train, demo, caption and evaluate across
processes.
"""

import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module

from lora_engine import cli
from lora_engine.other_names import VERB_REASONS, ours_for, reason_for
from lora_engine.other_names import VERBS as OTHER_VERBS
from lora_engine.ranks import open_ranks
from lora_engine.version import __version__

VERBS = {  # a recipe for train and demo, else a function of the same name in commands/
    "train": "train an adapter on your image-caption pairs, with the settings of recipes.finetune",
    "demo": "train the embedded demo; demo vit_gpt2 trains the one of the other family",
    "tune": "choose learning rate, rank and variant of LoRA by many short runs",
    "caption": "caption images with a trained adapter",
    "evaluate": "score captions against references, with and without an adapter",
    "merge": "merge an adapter into its base model, as a plain Hugging Face folder",
    "blend": "add up adapters of one base with weights, as one adapter",
    "report": "write the results of a run, or compare several, as one HTML file",
    "download": "download the images of a list of links, such as CC3M's, with img2dataset",
    "validate": "read every row and image of a data set and list those that cannot be used",
    "app": "compare captions of adapters on a page in the browser",
    "doctor": "check this machine for training and suggest fixes",
}
SHARED_OUT = "train", "demo", "caption", "evaluate"  # over the processes that torchrun starts
DEMOS = {"blip": "blip_cc3m", "vit_gpt2": "vit_gpt2_cc3m"}  # the recipe of each


def run_verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(__doc__)
        for name, purpose in VERBS.items():
            print(f"  {name:<10} {purpose}")
        print("\npython -m lora_engine VERB --help lists the flags of a verb")
        return 0 if args else cli.USAGE_ERROR
    if args[0] in ("--version", "-V", "version"):
        print(f"lora_engine {__version__}")
        return 0
    if args[0] not in SHARED_OUT:
        with open_ranks() as ranks:  # of which one reports an error
            if args[0] not in VERBS:
                raise ValueError(f"there is no verb {args[0]!r}; {_advice_on_verb(args[0])}")
            if ranks.size > 1:
                raise ValueError(
                    f"lora_engine {args[0]} runs in one process; start it without torchrun"
                )
    return _command(args[0])(args[1:])


def _command(verb: str) -> Callable[[list[str]], int]:
    """What a verb calls, imported only now."""
    if verb == "train":
        return import_module("recipes.finetune").main
    if verb == "demo":
        return _demo
    return getattr(import_module(f"lora_engine.commands.{verb}"), verb)


def _demo(args: list[str]) -> int:
    name, *flags = args if args and not args[0].startswith("-") else ["blip", *args]
    flag = next((arg for arg in flags if arg.startswith(("--train", "--val_d", "--val-d"))), None)
    name = name.replace("-", "_")
    if name not in DEMOS or flag is not None:
        with open_ranks():
            if flag is not None:
                raise ValueError(f"demo draws its own data; with {flag} use the verb train")
            raise ValueError(f"there is no demo {name!r}; known: {', '.join(DEMOS)}")
    return import_module(f"recipes.{DEMOS[name]}").main(flags)


def _advice_on_verb(name: str) -> str:
    if name.startswith("-"):
        return f"a verb, such as train, comes first: {cli.this_program()} VERB {name} ..."
    ours = ours_for(name.lower(), OTHER_VERBS, VERBS)
    reason = reason_for(name.lower(), VERB_REASONS)
    if ours is not None:
        return f"it is {ours} here"
    if reason is not None:
        return reason
    if os.path.exists(name):
        return f"to caption images: {cli.this_program()} caption --adapter RUN {cli.quoted(name)}"
    near = difflib.get_close_matches(name, VERBS, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VERBS)}"


def main() -> None:
    sys.exit(cli.run(run_verb))


if __name__ == "__main__":
    main()
