"""What a person sees of a run: its folder, metrics, curves, report, model card, and trackers."""
