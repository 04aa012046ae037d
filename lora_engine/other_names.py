"""What other trainers and captioning tools call our flags, verbs, keywords and Python names."""

from collections.abc import Collection

# Our flag (and value), and others' names for it. Where the first word is no flag of a command, the
# next line with that name counts.
FLAGS = {
    "--lr": "learning_rate base_lr peak_lr lr_rate",
    "--epochs": "num_train_epochs num_epochs n_epochs max_epochs epoch",
    "--max_steps": "max_train_steps num_train_steps num_steps max_iters total_steps",
    "--batch_size": "per_device_train_batch_size train_batch_size per_device_eval_batch_size "
                    "eval_batch_size per_gpu_train_batch_size micro_batch_size bs batch",
    "--grad_accum_steps": "gradient_accumulation_steps accumulate_grad_batches grad_accum "
                          "accumulation_steps",
    "--output_path": "output_dir out_dir output save_dir run_dir logging_dir run_name out",
    "--out": "output output_file output_path output_dir save_path result_file",
    "--model": "model_name_or_path pretrained_model_name_or_path base_model model_name model_id "
               "model_path base pretrained",
    "--revision": "model_revision",
    "--train_data_path": "train_file train_data train_data_dir data data_path data_dir "
                         "dataset dataset_name dataset_path train_path train_dataset annotations "
                         "images image input",
    "--val_data_path": "validation_file val_data validation_data eval_file eval_data_path "
                       "eval_dataset validation_dir val_path test_file",
    "--data": "val_data_path train_data_path data_path val_data validation_data eval_data "
              "eval_dataset test_file validation_file dataset dataset_name references refs "
              "annotations gt images image input",
    "--image_field": "image_column image_column_name",
    "--caption_field": "caption_column text_column caption_column_name",
    "--image_root": "image_dir images_dir image_folder img_dir",
    "--val_fraction": "validation_split_percentage val_split test_size validation_split",
    "--lora_rank": "lora_r r rank lora_dim network_dim",
    "--lora_alpha": "alpha network_alpha",
    "--lora_dropout": "dropout",
    "--lora_targets": "target_modules lora_target_modules lora_target targets",
    "--lora_layers": "layers_to_transform num_lora_layers",
    "--use_rslora": "rslora",
    "--use_dora": "dora",
    "--use_lorafa": "lora_fa lorafa freeze_a",
    "--init_lora_weights": "init_weights lora_init init_lora",
    "--init_lora_weights pissa": "pissa use_pissa",
    "--init_lora_weights olora": "olora use_olora",
    "--init_lora_weights eva": "eva use_eva eva_config",
    "--loraplus_lr_ratio": "lora_plus_lr_ratio loraplus lora_plus lr_ratio",
    "--init_adapter": "adapter adapter_name_or_path lora_weights peft_model checkpoint lora",
    "--adapter": "lora lora_path lora_weights peft_model peft_model_id adapter_path checkpoint "
                 "ckpt adapter_name_or_path weights run checkpoint_path",
    "--warmup_steps": "lr_warmup_steps num_warmup_steps warmup",
    "--warmup_ratio": "lr_warmup_ratio warmup_fraction warmup_proportion pct_start",
    "--lr_schedule": "lr_scheduler_type lr_scheduler scheduler scheduler_type schedule "
                     "learning_rate_schedule lr_decay lr_decay_style",
    "--min_lr": "min_learning_rate lr_min eta_min lr_end end_lr final_lr",
    "--decay_ratio": "lr_decay_ratio cooldown_ratio cooldown_fraction decay_fraction "
                     "num_decay_steps decay_steps lr_decay_steps",
    "--adam_beta1": "beta1 beta_1",
    "--adam_beta2": "beta2 beta_2",
    "--ema_decay": "ema use_ema model_ema model_ema_decay",
    "--max_grad_norm": "max_norm grad_clip gradient_clip_val clip_grad_norm",
    "--label_smoothing": "label_smoothing_factor",
    "--max_caption_tokens": "max_seq_length max_length max_target_length max_seq_len cutoff_len "
                            "block_size",
    "--precision bf16": "bf16 bfloat16",
    "--precision fp16": "fp16 half amp",
    "--precision": "mixed_precision torch_dtype dtype",
    "--compile": "torch_compile",
    "--num_workers": "dataloader_num_workers workers num_proc preprocessing_num_workers",
    "--save_every": "save_steps checkpointing_steps save_strategy save_freq",
    "--keep_last": "save_total_limit checkpoints_total_limit",
    "--log_every": "logging_steps log_interval log_steps",
    "--eval_every": "eval_steps eval_strategy evaluation_strategy eval_interval validation_steps "
                    "val_check_interval",
    "--best_by": "metric_for_best_model monitor",
    "--patience": "early_stopping_patience early_stopping",
    "--track": "report_to with_tracking wandb tensorboard tracker",
    "--push_to_hub": "hub_model_id hub_repo_id",
    "--resume": "resume_from_checkpoint checkpoint ckpt resume_from ckpt_path",
    "--split": "dataset_split",
    "--num_beams": "beam_size beams num_beam beam beam_width",
    "--max_new_tokens": "max_length max_len max_tokens max_target_length",
    "--temperature 1": "do_sample sample sampling",
    "--prompt": "instruction text prefix",
    "--images": "image img input inputs",
    "--overwrite": "force_overwrite",
}

# Why there is no such flag.
REASONS = {
    "images are given without a flag: caption photo.jpg folder/":
        "image images img input inputs image_path image_dir input_dir image_file file i",
    "the optimizer is AdamW; --adam_beta1, --adam_beta2 and --weight_decay set it": "optim "
        "optimizer adam_epsilon use_8bit_adam momentum betas",
    "--min_lr is the final learning rate itself": "min_lr_ratio min_lr_rate lr_scheduler_kwargs",
    "a run never overwrites another: give a new --output_path": "overwrite_output_dir "
        "overwrite",
    "torchrun --nproc_per_node N -m lora_engine ... starts several processes": "local_rank "
        "deepspeed fsdp ddp_backend num_processes num_gpus gpus devices accelerator strategy "
        "nproc_per_node multi_gpu world_size ddp_find_unused_parameters",
    "every run trains and validates": "do_train do_eval do_predict evaluate predict_with_generate",
    "every run trains LoRA; the encoder is frozen": "use_peft use_lora peft lora_enable "
        "freeze_encoder freeze_vision_model freeze_vision peft_type",
    "each setting of LoRA is given by itself, such as --lora_rank and --use_dora": "peft_config "
        "lora_config",
    "all bias, embedding and norm weights stay frozen": "bias lora_bias modules_to_save",
    "adapter/ is always that of the best validation (--best_by)": "load_best_model_at_end "
        "save_best_only save_only_model save_safetensors",
    "fp32 is computed in full precision": "tf32",
    "beam search ends as transformers' does with early_stopping=False": "early_stopping",
    "beams are searched in one group": "num_beam_groups diversity_penalty",
    "samples are drawn by temperature, top_k and top_p": "min_p typical_p epsilon_cutoff "
        "eta_cutoff",
    "keys and values of earlier tokens are always kept": "use_cache",
    "weights are not quantized; --encoder_precision int8 computes the encoder faster on a CPU":
        "load_in_8bit load_in_4bit quantization quantize bits qlora use_qlora",
    "code from model folders is never run": "trust_remote_code",
    "`hf auth login` stores a token": "token hub_token use_auth_token hf_token",
    "images are resized as the checkpoint's preprocessor says": "image_size resolution img_size "
        "crop_size input_size center_crop random_flip",
    "the tokenizer is that of the checkpoint": "tokenizer_name tokenizer",
    "use a smaller data file to train on fewer rows": "max_train_samples max_eval_samples "
        "max_samples limit num_train_samples",
    "settings are flags; --print_config prints all of them": "config config_file config_name "
        "cfg yaml",
    "all settings are in config.json of the run folder": "save_config logging_strategy "
        "logging_first_step log_level remove_unused_columns disable_tqdm",
}

VERBS = {
    "train": "finetune fine-tune fine_tune fit training lora run sft resume",
    "demo": "example quickstart try tutorial",
    "tune": "hpo sweep hyperopt optimize search hparams grid tuning",
    "caption": "generate predict infer inference describe captions captioning sample",
    "evaluate": "eval test score metrics benchmark evaluation",
    "merge": "export merge_and_unload save convert fuse merge-lora export-model",
    "blend": "average soup combine merge-adapters merge_adapters mix weighted add_weighted_adapter",
    "report": "compare plot show results history",
    "download": "fetch get img2dataset prepare",
    "validate": "check lint verify inspect",
    "doctor": "env info diagnose system",
    "app": "serve web gradio ui webui chat",
}
VERB_REASONS = {
    "caption reads paths from stdin (caption - ...)": "api",
    "train --push_to_hub owner/name uploads the adapter, as `hf upload` does": "push upload",
    "`hf auth login` stores a token": "login auth",
    "without arguments all verbs are listed": "help list",
}
# Names of the package, and others' names for them.
PYTHON = {
    "load_captioner": "load load_model load_model_and_preprocess create_model_and_transforms "
                      "pipeline from_pretrained AutoModel AutoModelForVision2Seq AutoProcessor "
                      "AutoModelForImageTextToText BlipForConditionalGeneration BlipProcessor "
                      "VisionEncoderDecoderModel PeftModel AutoPeftModel load_peft_weights",
    "train": "Trainer Seq2SeqTrainer SFTTrainer fit finetune fine_tune",
    "TrainingConfig": "TrainingArguments Seq2SeqTrainingArguments SFTConfig Config",
    "inject": "get_peft_model LoraConfig LoRAConfig PeftConfig inject_adapter_in_model add_adapter",
    "merge": "merge_and_unload fuse_lora",
    "unmerge": "unmerge_adapter unfuse_lora",
    "save_adapter": "save_pretrained save save_lora_weights",
    "load_adapter": "load_lora_weights set_peft_model_state_dict",
    "ImageCaptioner": "Captioner",
}
# Keywords of the package's functions (and values), where they are not named like a flag, or where
# FLAGS has another meaning for a name.
KEYWORDS = {
    "images": "image img image_path image_paths file path inputs input raw_image pixel_values",
    "config": "args training_args training_arguments settings",
    "data": "train_dataset train_dataloader rows pairs",
    "validation": "eval_dataset val_dataset eval_data val val_dataloader",
    "callback": "callbacks",
    "device": "device_map",
    "temperature 1": "use_nucleus_sampling",
    "min_new_tokens": "min_length",
    "num_return_sequences": "num_captions",
    "return_scores": "output_scores return_dict_in_generate",
    "targets": "modules",
    "layers_to_transform": "layers lora_layers",
}


def ours_for(name: str, table: dict[str, str], known: Collection[str]) -> str | None:
    """Our name for another tool's, if it is `known`: a flag and value, a verb, a Python name."""
    for ours, others in table.items():
        if name in others.split() and ours.split()[0] in known:
            return ours
    return None


def reason_for(name: str, table: dict[str, str]) -> str | None:
    """What to do instead, where there is nothing of that kind here."""
    return next((reason for reason, others in table.items() if name in others.split()), None)
