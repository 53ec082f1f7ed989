"""Names of our keys in Lightning, Composer, Hugging Face's Trainer, torchtitan and torchrun."""

from __future__ import annotations

from collections.abc import Iterable

from everstep.errors import nearest

GOES_ON = "a run goes on when its run= is given again; init_from= takes the weights of another"
EPOCHS = "write steps=3ep for three epochs"
ACCUMULATION = "global_batch= is the batch of a step, micro_batch= what one process takes at once; the rest follows"
FOUND = "devices are found; job.nproc= says how many processes there are on each node"

KEYS = {
    "run": "name run_name experiment_name exp_name run_id",
    "run_root": "output_dir default_root_dir save_folder save_dir log_dir dump_folder results_dir dirpath",
    "steps": "max_steps max_duration training_steps train_steps max_iters iterations",
    EPOCHS: "max_epochs epochs num_epochs num_train_epochs epoch",
    "global_batch": "batch_size bs train_batch_size global_batch_size global_train_batch_size",
    "micro_batch": "per_device_train_batch_size device_train_microbatch_size micro_batch_size local_batch_size",
    ACCUMULATION: "accumulate_grad_batches gradient_accumulation_steps grad_accum grad_accum_steps",
    "seed": "seed_everything random_seed manual_seed",
    "clip": "gradient_clip_val max_grad_norm max_norm grad_clip clip_grad clip_grad_norm gradient_clipping",
    "ema": "ema_decay",
    "hooks": "callbacks",
    "optimizer": "optim",
    "optimizer.lr": "lr learning_rate max_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "schedule": "scheduler lr_scheduler lr_scheduler_type",
    "schedule.warmup_steps": "warmup warmup_steps num_warmup_steps lr_warmup_steps",
    "data": "dataset train_dataset datamodule train_loader",
    "data.path": "data_path dataset_path data_dir data_root",
    "order.shuffle": "shuffle",
    "loader.workers": "num_workers dataloader_num_workers workers",
    "loader.prefetch": "prefetch_factor",
    "parallel": "strategy ddp fsdp fsdp_config fsdp2 hsdp distributed_strategy",
    "parallel.shard": "data_parallel_shard_degree",
    "parallel.compile": "torch_compile compile_model",
    "parallel.checkpoint_blocks": "activation_checkpointing gradient_checkpointing activation_checkpoint",
    "precision": "bf16 fp16 amp mixed_precision dtype",
    "checkpoint.every": "save_every save_interval save_steps checkpoint_every every_n_train_steps ckpt_every",
    "checkpoint.keep_last": "save_total_limit save_num_checkpoints_to_keep keep_latest_k",
    "checkpoint.keep_best": "save_top_k",
    "evaluate.every": "eval_every eval_interval eval_steps val_check_interval check_val_every_n_epoch",
    "evaluate.patience": "patience early_stopping early_stopping_patience",
    "log.every": "log_every log_every_n_steps log_interval logging_steps log_freq",
    "log.wandb.enabled": "wandb use_wandb logger loggers report_to",
    "log.wandb.project": "project wandb_project",
    "log.tensorboard": "tensorboard use_tensorboard",
    "stop.wall_time_s": "max_time",
    "job.nodes": "nodes num_nodes nnodes",
    "job.nproc": "devices gpus num_devices num_gpus nproc nproc_per_node ntasks_per_node gpus_per_node num_processes",
    "job.time": "time time_limit timeout_min walltime",
    "job.partition": "partition slurm_partition",
    "job.account": "account slurm_account",
    "job.image": "image container docker_image",
    GOES_ON: "resume resume_from resume_from_checkpoint ckpt_path load_path checkpoint_path auto_resume",
    FOUND: "accelerator device no_cuda use_cpu",
}
"""Our key → their names. An entry with a space is a sentence, for names that have no such key."""

_OURS = {name: ours for ours, names in KEYS.items() for name in names.split()}


def meant(key: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the key that was probably meant, or an empty string."""
    near = "" if key in _OURS else nearest(key, known)
    ours = _OURS.get(key.rpartition(".")[2])
    if near or ours is None:
        return near
    return f"; {ours}" if " " in ours else f"; did you mean {ours!r}?"
