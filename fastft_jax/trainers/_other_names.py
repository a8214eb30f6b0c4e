"""Names of transformers' TrainingArguments and TRL's SFTConfig that `SFTConfig` does not have, and why, one by one."""

from fastft_jax.trainers.options import Elsewhere, NotBuilt

_ONE_DEVICE = NotBuilt("a run uses one device")
_HUB = NotBuilt("nothing is uploaded; push the adapter folder with the huggingface_hub command line")
_LOADER = NotBuilt("rows are tokenized once before training and batches are built in the process")
_DTYPE = Elsewhere("model.dtype (from_pretrained's dtype): bfloat16, float32")
_REMAT = Elsewhere("lora.use_gradient_checkpointing (get_peft_model's use_gradient_checkpointing)")
_XLA = NotBuilt("the step is always compiled, by XLA")
_QUIET = NotBuilt("every logged step is one line; redirect standard error to silence it")
_LOSS = NotBuilt("the loss is the mean negative log-likelihood of the trained tokens")
_MEMORY = NotBuilt("XLA plans memory before the first step")
_BEST = NotBuilt("checkpoints are kept by age; pick one from metrics.jsonl")
_TEMPLATE = Elsewhere("chat_template (in the data section of a file)")
_ORDER = Elsewhere("shuffle: true or false")
_METRICS = NotBuilt("evaluation gives loss, perplexity and token accuracy through the same chunked loss as training")
_PAD = NotBuilt("rows have max_length tokens, so that a run compiles once")

TRAINING: dict[str, Elsewhere | NotBuilt] = {
    # precision, memory, compilation
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "half_precision_backend"), _DTYPE),
    **dict.fromkeys(("gradient_checkpointing", "gradient_checkpointing_kwargs"), _REMAT),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), _REMAT),
    "activation_offloading": Elsewhere("lora.use_gradient_checkpointing: offload"),
    "tf32": NotBuilt("float32 runs compute in full float32"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode", "jit_mode_eval"), _XLA),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _XLA),
    **dict.fromkeys(("torch_empty_cache_steps", "auto_find_batch_size", "skip_memory_metrics"), _MEMORY),
    "use_cache": NotBuilt("training keeps no key/value cache"),
    "use_cpu": NotBuilt("JAX chooses the device; set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": NotBuilt("JAX chooses the device; set JAX_PLATFORMS=cpu in the environment"),
    "enable_jit_checkpoint": NotBuilt("SIGTERM and SIGINT always save a checkpoint"),
    # several devices
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "fsdp_min_num_params", "accelerator_config"), _ONE_DEVICE),
    **dict.fromkeys(("parallelism_config", "local_rank", "ddp_find_unused_parameters"), _ONE_DEVICE),
    **dict.fromkeys(("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), _ONE_DEVICE),
    **dict.fromkeys(("ddp_backend", "ddp_timeout", "log_on_each_node", "save_on_each_node"), _ONE_DEVICE),
    "average_tokens_across_devices": _ONE_DEVICE,
    # data
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"), _LOADER),
    **dict.fromkeys(("dataloader_prefetch_factor", "dataloader_multiprocessing_context"), _LOADER),
    **dict.fromkeys(("dataloader_in_order", "dataset_num_proc", "dataset_kwargs", "remove_unused_columns"), _LOADER),
    "dataloader_drop_last": NotBuilt("every row is trained on once an epoch; the last batch is filled with padding"),
    "ignore_data_skip": NotBuilt("a resumed run always goes on with the batch it would have seen"),
    "restore_callback_states_from_checkpoint": NotBuilt("there are no callbacks"),
    "shuffle_dataset": _ORDER,
    "train_sampling_strategy": _ORDER,
    **dict.fromkeys(("group_by_length", "length_column_name"), NotBuilt("use packing: true, which wastes less")),
    "label_names": NotBuilt("labels are made from the text"),
    "dataset_text_field": NotBuilt("plain text is read from the column text; rename the column"),
    "max_seq_length": Elsewhere("max_length, or model.max_seq_length"),
    "truncation_mode": NotBuilt("long samples keep their start"),
    **dict.fromkeys(("packing_strategy", "eval_packing"), NotBuilt("packing is first-fit decreasing, everywhere")),
    "padding_free": Elsewhere("packing: true"),
    **dict.fromkeys(("pad_to_multiple_of", "group_by_modality_length"), _PAD),
    "assistant_only_loss": Elsewhere("train_on_responses_only"),
    "completion_only_loss": Elsewhere("train_on_responses_only"),
    "chat_template_path": _TEMPLATE,
    **dict.fromkeys(("eos_token", "pad_token"), NotBuilt("special tokens are the tokenizer's own")),
    # model
    "model_init_kwargs": Elsewhere("the model section (from_pretrained's arguments)"),
    "trust_remote_code": NotBuilt("code from a model's repository is never run"),
    "router_aux_loss_coef": NotBuilt("no mixture-of-experts model is supported"),
    # loss and optimizer
    **dict.fromkeys(("loss_type", "label_smoothing_factor"), _LOSS),
    "neftune_noise_alpha": NotBuilt("no noise is added to embeddings"),
    **dict.fromkeys(("optim_args", "optim_target_modules"), NotBuilt("optimizers have no further arguments")),
    "full_determinism": NotBuilt("runs on CPU are always bit-exact"),
    # evaluation
    "evaluation_strategy": Elsewhere("eval_strategy"),
    **dict.fromkeys(("eval_delay", "eval_on_start"), NotBuilt("evaluation follows eval_strategy")),
    **dict.fromkeys(("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object"), _METRICS),
    **dict.fromkeys(("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"), _METRICS),
    **dict.fromkeys(("include_inputs_for_metrics", "include_num_input_tokens_seen"), _METRICS),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    # logging and saving
    **dict.fromkeys(("logging_strategy", "logging_first_step"), Elsewhere("logging_steps")),
    "logging_nan_inf_filter": NotBuilt("a non-finite loss or gradient stops the run"),
    "logging_dir": NotBuilt("TensorBoard's files are in output_dir/tensorboard"),
    **dict.fromkeys(("log_level", "log_level_replica", "disable_tqdm", "debug"), _QUIET),
    "project": NotBuilt("trackers read their own environment, such as WANDB_PROJECT"),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), NotBuilt("no Trackio")),
    "save_only_model": NotBuilt("a checkpoint always holds what an exact resume needs; the adapter is in output_dir"),
    "save_safetensors": NotBuilt("adapters are always safetensors"),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), NotBuilt("sft trains; data.eval_path adds evaluation")),
}
