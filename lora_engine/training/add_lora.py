"""The LoRA layers of a run: new ones, those of --init_adapter, or those of a checkpoint."""

from lora_engine.config import TrainingConfig
from lora_engine.lora.adapter import load_adapter, naming_base, read_adapter, restore_initial
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.lora.initialization import CHANGES_WEIGHT
from lora_engine.lora.injection import InjectionPlan, inject
from lora_engine.models.pretrained import Captioner
from lora_engine.training.checkpoint import Checkpoint


def add_lora(
    captioner: Captioner, config: TrainingConfig, checkpoint: Checkpoint | None
) -> InjectionPlan:
    """Inject new adapters, those of --init_adapter, or those of the checkpoint to resume from.

    With --init_lora_weights eva, A is drawn as by default until `initialize_eva`.
    """
    how = config.init_lora_weights
    if checkpoint is not None:
        if how in CHANGES_WEIGHT:
            plan = _inject(captioner, config, "default")
            restore_initial(captioner.model, checkpoint.adapter)
            return plan
        return load_adapter(
            captioner.model, checkpoint.adapter,
            dropout=config.lora_dropout, use_lorafa=config.use_lorafa,
        )
    if config.init_adapter is not None:
        return _continue_adapter(captioner, config, config.init_adapter)
    return _inject(captioner, config, "default" if how == "eva" else how)


def _inject(captioner: Captioner, config: TrainingConfig, how: str) -> InjectionPlan:
    return inject(
        captioner.model,
        config.lora_targets,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        rank_pattern=config.patterns("rank_pattern"),
        alpha_pattern=config.patterns("alpha_pattern"),
        layers_to_transform=config.lora_layers or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        use_lorafa=config.use_lorafa,
        init_lora_weights=how,
    )


def _continue_adapter(captioner: Captioner, config: TrainingConfig, name: str) -> InjectionPlan:
    adapter = read_adapter(find_adapter(name))
    if "prompt" in adapter.provenance and adapter.prompt != config.prompt:
        raise ValueError(
            f"the adapter in {name} was trained with --prompt {adapter.prompt!r}, this run has "
            f"{config.prompt!r}; give the same one"
        )
    for flag in ("use_dora", "use_rslora"):
        if getattr(config, flag) and not adapter.config.get(flag):
            raise ValueError(
                f"--{flag}: the adapter in {name} was trained without it; omit --{flag}, or begin "
                f"a new adapter without --init_adapter"
            )
    with naming_base(adapter, captioner.name):
        plan = load_adapter(
            captioner.model, adapter, dropout=config.lora_dropout, use_lorafa=config.use_lorafa
        )
    complaint = adapter.foreign_base(captioner.name, captioner.fingerprints)
    if complaint is not None:
        raise ValueError(
            f"--init_adapter {complaint}; train on its own base ({adapter.base_model})"
        )
    return plan
