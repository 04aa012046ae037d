"""How a run goes: setup, the loop, validation, checkpoints, and resuming."""
