"""The names that keys of a configuration have in other tools, for errors about unknown keys.

The tools are axolotl, LLaMA-Factory, mlx-lm, peft, transformers, trl and unsloth. A name is never taken for our key,
because units and meanings differ: `warmup_steps` counts steps, and `train.warmup` is a share of them.
"""

from __future__ import annotations

# our key -> its names elsewhere; a name may stand behind several keys
_NAMES = {
    "name": "run_name output_dir save_path wandb_name wandb_run_id experiment_name",
    "model.source": "base_model model_name_or_path model_name model_id base_model_name_or_path"
    " pretrained_model_name_or_path hf_path",
    "model.revision": "revision_of_model model_revision",
    "data.source": "dataset datasets dataset_name dataset_path dataset_dir data_files train_file train_data"
    " train_dataset hf_dataset",
    "data.subset": "dataset_config dataset_config_name dataset_subset",
    "data.split": "dataset_split dataset_train_split train_split train_on_split",
    "data.form": "dataset_type dataset_format prompt_style",
    "data.columns": "dataset_text_field text_field text_feature prompt_feature completion_feature chat_feature"
    " field_messages field_instruction field_output message_property_mappings prompt_column response_column",
    "data.held_out": "val_set_size val_size test_size valid_fraction validation_split validation_split_percentage"
    " eval_dataset eval_file valid_file test_datasets",
    "data.sources": "datasets dataset_mixer dataset_mixture interleave_probs mix_strategy",
    "data.validation": "eval_dataset eval_file valid_file validation_file test_datasets",
    "data.template_options": "chat_template_kwargs enable_thinking",
    "data.limit": "max_samples max_train_samples num_samples",
    "data.seed": "dataset_seed split_seed",
    "train": "training training_args training_arguments sft_config",
    "train.trainer": "stage rl trainer_type",
    "train.method": "adapter finetuning_type fine_tune_type peft_type load_in_4bit load_in_8bit quantization_bit"
    " bnb_config bnb_4bit_quant_type use_peft",
    "train.lora": "lora_config peft_config lora_parameters",
    "train.lora.rank": "r lora_r lora_rank lora_dim",
    "train.lora.alpha": "lora_alpha lora_scale",
    "train.lora.dropout": "lora_dropout",
    "train.lora.target_modules": "lora_target lora_target_modules lora_target_linear lora_modules lora_keys",
    "train.epochs": "num_epochs num_train_epochs n_epochs train_epochs",
    "train.max_steps": "iters max_iters num_steps train_steps total_steps num_training_steps",
    "train.max_minutes": "max_time max_train_time",
    "train.batch_size": "micro_batch_size per_device_train_batch_size per_gpu_train_batch_size train_batch_size",
    "train.accumulate": "gradient_accumulation_steps grad_accumulation_steps gradient_accumulation"
    " accumulate_grad_batches",
    "train.learning_rate": "lr base_lr max_lr peak_lr",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "train.warmup": "warmup_ratio warmup_steps warmup_iters lr_warmup_steps",
    "train.max_length": "max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length cutoff_len"
    " model_max_length block_size max_prompt_length",
    "train.packing": "sample_packing neat_packing group_by_length",
    "train.loss_on": "train_on_inputs train_on_prompt train_on_responses_only mask_prompt mask_history"
    " assistant_only_loss completion_only_loss roles_to_train",
    "train.optimizer": "optim",
    "train.weight_decay": "weight_decay",
    "train.max_grad_norm": "max_grad_norm gradient_clipping max_norm clip_grad_norm",
    "train.early_stopping": "early_stopping_patience load_best_model_at_end",
    "train.gradient_checkpointing": "gradient_checkpointing use_gradient_checkpointing grad_checkpoint",
    "train.attention": "attn_implementation flash_attention flash_attn use_flash_attention_2 sdp_attention",
    "train.liger": "use_liger_kernel enable_liger_kernel liger_kernel",
    "train.compile": "torch_compile",
    "train.keep_checkpoints": "save_total_limit",
    "train.options": "neftune_noise_alpha label_smoothing_factor adam_beta1 adam_beta2 adam_epsilon"
    " lr_scheduler_kwargs dataloader_num_workers",
    "train.lora.options": "use_rslora use_dora init_lora_weights modules_to_save rank_pattern alpha_pattern"
    " layers_to_transform",
    "train.checkpoint_every": "save_steps save_every save_strategy saves_per_epoch save_interval",
    "train.evaluate_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval steps_per_eval"
    " val_check_interval",
    "train.seed": "random_state random_seed manual_seed",
    "merge.base": "merge_lora save_method fuse de_quantize",
    "merge.adapter": "adapter adapter_name_or_path adapter_path adapter_file lora_model_dir resume_adapter_file",
    "evaluate.max_tokens": "max_eval_samples eval_samples val_batches test_batches",
    "evaluate.prompts": "sample_prompts eval_prompts",
    "quantize": "quantization quantisation",
    "quantize.variants": "quant_type quant_types quantization_method q_bits q_group_size bits export_quantization_bit"
    " outtype quantization_config",
    "publish": "hub push_to_hub",
    "publish.repo": "hub_model_id push_to_hub_model_id export_hub_model_id hub_repo_id repo_id hf_repo upload_repo",
    "publish.private": "hub_private_repo",
    "publish.commits": "hub_strategy",
    "track.tracker": "report_to log_with use_wandb",
    "track.project": "wandb_project trackio_project mlflow_experiment_name project_name",
    "track.space": "trackio_space_id trackio_space",
}

OUR_KEYS: dict[str, tuple[str, ...]] = {}
for _key, _names in _NAMES.items():
    for _name in _names.split():
        OUR_KEYS[_name] = (*OUR_KEYS.get(_name, ()), _key)

_CHOSEN = "here this is chosen automatically: "
_TYPES = f"{_CHOSEN}bf16 if the machine computes fast in it, float32 otherwise"
_FILES = f"{_CHOSEN}as the base model's files say"
_STOPPED = "here a stopped run continues with the same command, and --fresh starts it again"
_TOKEN = "a token is not part of a configuration. Try: HF_TOKEN, or hf auth login"

# a name elsewhere -> why there is no key for it here
NO_KEY = {
    **dict.fromkeys(
        (
            "bf16",
            "fp16",
            "tf32",
            "bfloat16",
            "float16",
            "float32",
            "pure_bf16",
            "dtype",
            "torch_dtype",
            "compute_dtype",
        ),
        _TYPES,
    ),
    **dict.fromkeys(("mixed_precision", "bnb_4bit_compute_dtype"), _TYPES),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "double_quantization", "use_double_quant"), "here this is always on"),
    **dict.fromkeys(("save_safetensors", "safe_serialization"), "here this is always on"),
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "steps_per_report", "log_interval"), "here every step is logged"
    ),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints", "overwrite_output_dir"), _STOPPED),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp", "num_gpus", "n_gpu", "num_processes"),
        "here the option --accelerate starts several processes",
    ),
    **dict.fromkeys(("token", "hub_token", "hf_token", "hf_use_auth_token", "use_auth_token"), _TOKEN),
    **dict.fromkeys(("model_type", "tokenizer_type", "special_tokens"), _FILES),
    "device_map": f"{_CHOSEN}the GPU if there is one, otherwise the CPU",
    "logging_dir": "here the logs are in the run's folder",
}
