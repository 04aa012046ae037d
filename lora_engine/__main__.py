"""Commands for before and after training: python -m lora_engine VERB, or lora-engine VERB.

torchrun --nproc_per_node 2 -m lora_engine VERB shares out the images of caption and evaluate.
"""

import sys
from collections.abc import Callable
from importlib import import_module

from lora_engine import cli
from lora_engine.ranks import open_ranks

VERBS = {  # each a function of the same name in commands/, imported only when it is called
    "caption": "caption images with a trained adapter",
    "evaluate": "score captions against references, with and without an adapter",
    "merge": "merge an adapter into its base model, as a plain Hugging Face folder",
    "report": "write the results of a run, or compare several, as one HTML file",
    "download": "download the images of a list of links, such as CC3M's, with img2dataset",
    "validate": "read every row and image of a data set and list those that cannot be used",
    "app": "compare captions of adapters on a page in the browser",
    "doctor": "check this machine for training and suggest fixes",
}
SHARED_OUT = "caption", "evaluate"  # over the processes that torchrun starts


def run_verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        for name, purpose in VERBS.items():
            print(f"  {name:<10} {purpose}")
        print("\npython -m lora_engine VERB --help lists the flags of a verb")
        return 0 if args else cli.USAGE_ERROR
    if args[0] not in SHARED_OUT:
        with open_ranks() as ranks:  # of which one reports an error
            if args[0] not in VERBS:
                raise ValueError(f"there is no verb {args[0]!r}; known: {', '.join(VERBS)}")
            if ranks.size > 1:
                raise ValueError(
                    f"lora_engine {args[0]} runs in one process; start it without torchrun"
                )
    verb: Callable[[list[str]], int] = getattr(
        import_module(f"lora_engine.commands.{args[0]}"), args[0]
    )
    return verb(args[1:])


def main() -> None:
    sys.exit(cli.run(run_verb))


if __name__ == "__main__":
    main()
