"""Options of trl and peft that a configuration cannot pass on: the key that sets each, or the reason.

All other fields of the trainer's configuration class and of `peft.LoraConfig` can be set in `train.options` and
`train.lora.options`. `pipeline.training.options` checks their names and values with the installed classes.
"""

from __future__ import annotations

from collections.abc import Iterable


def _rows(table: dict[str, str]) -> dict[str, str]:
    return {name: why for names, why in table.items() for name in names.split()}


# name in trl -> the key of ours that sets it
TRAINER_KEYS = _rows(
    {
        "per_device_train_batch_size per_device_eval_batch_size": "train.batch_size",
        "gradient_accumulation_steps": "train.accumulate",
        "num_train_epochs": "train.epochs",
        "max_steps": "train.max_steps",
        "learning_rate": "train.learning_rate",
        "lr_scheduler_type": "train.schedule",
        "warmup_steps warmup_ratio": "train.warmup",
        "optim": "train.optimizer",
        "weight_decay": "train.weight_decay",
        "max_grad_norm": "train.max_grad_norm",
        "max_length truncation_mode": "train.max_length",
        "packing eval_packing packing_strategy padding_free train_sampling_strategy length_column_name":
            "train.packing",
        "completion_only_loss assistant_only_loss": "train.loss_on",
        "gradient_checkpointing activation_checkpointing activation_checkpointing_kwargs":
            "train.gradient_checkpointing",
        "torch_compile": "train.compile",
        "use_liger_kernel": "train.liger",
        "load_best_model_at_end metric_for_best_model greater_is_better": "train.early_stopping",
        "save_strategy save_steps": "train.checkpoint_every",
        "save_total_limit": "train.keep_checkpoints",
        "eval_strategy eval_steps": "train.evaluate_every",
        "seed data_seed": "train.seed",
        "output_dir run_name": "name",
        "model_init_kwargs trust_remote_code": "model",
        "chat_template_path eos_token pad_token": "data.chat_template",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision": "publish.repo",
        "report_to project trackio_space_id trackio_bucket_id trackio_static_space_id": "track.tracker",
    }
)  # fmt: skip

_MACHINE = "the machine decides; TUNEPRESS_COMPUTE_DTYPE overrides the compute type"
_PROCESSES = "it is part of the file for --accelerate"
_EVERY_STEP = "every step is logged here, and its loss is checked"
_RESUME = "a stopped training must continue with the same result"
_MEASURED = "the held-out loss is measured here, the same for any batch size"
_HALVED = "a batch that does not fit into the GPU's memory is halved here, with the same global batch"
_DATA = "data arrives here as tokens; the keys of data prepare it"

# name in trl -> why nobody can set it
TRAINER_FIXED = _rows(
    {
        "bf16 fp16 bf16_full_eval fp16_full_eval use_cpu": _MACHINE,
        "accelerator_config parallelism_config fsdp fsdp_config deepspeed local_rank ddp_backend "
        "average_tokens_across_devices": _PROCESSES,
        "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
        "log_level_replica disable_tqdm include_num_input_tokens_seen": _EVERY_STEP,
        "save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip resume_from_checkpoint "
        "restore_callback_states_from_checkpoint": _RESUME,
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics do_train do_eval do_predict": _MEASURED,
        "auto_find_batch_size": _HALVED,
        "dataset_text_field dataset_kwargs dataset_num_proc remove_unused_columns label_names shuffle_dataset "
        "dataloader_drop_last use_cache": _DATA,
    }
)

# name in peft -> the key of ours that sets it
LORA_KEYS = _rows(
    {
        "r": "train.lora.rank",
        "lora_alpha": "train.lora.alpha",
        "lora_dropout": "train.lora.dropout",
        "target_modules": "train.lora.target_modules",
        "base_model_name_or_path revision": "model.source",
    }
)

_NOT_MERGED = "the result cannot be merged into the base model"

# name in peft -> why nobody can set it
LORA_FIXED = _rows(
    {
        "task_type peft_type auto_mapping peft_version inference_mode runtime_config": "the pipeline sets it",
        "fan_in_fan_out layer_replication target_parameters trainable_token_indices alora_invocation_tokens "
        "use_qalora qalora_group_size use_bdlora arrow_config kasa_config velora_config monteclora_config "
        "ensure_weight_tying megatron_config megatron_core": _NOT_MERGED,
        "loftq_config eva_config corda_config lora_ga_config":
            "it changes the base model or needs data before training, so a stopped training could not be continued",
    }
)  # fmt: skip
CONVERTED_BEGINNINGS = ("pissa", "olora")  # they change the base; the adapter is converted back after training
PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal")


def check_names(section: str, names: Iterable[str], keys: dict[str, str], fixed: dict[str, str]) -> None:
    """Raise if the pipeline owns one of these options.

    Raises:
        ValueError: naming the key that sets it, or why there is none.
    """
    for name in names:
        if name in keys:
            raise ValueError(f"{name} is set by {keys[name]}. Try: that key, and {section} without {name}")
        if name in fixed:
            raise ValueError(f"{name} cannot be set: {fixed[name]}. Try: {section} without {name}")
