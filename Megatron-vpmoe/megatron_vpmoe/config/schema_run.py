"""The sections that say how a run goes: optim, parallel, data, training, evaluation, checkpoint, logging."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from megatron_vpmoe.config.schema_objective import ObjectiveFields
from megatron_vpmoe.config.schema_section import (
    Amount,
    Cardinal,
    Count,
    Decay,
    Few,
    Fraction,
    Name,
    PositiveFloat,
    Rate,
    Section,
    Seed,
    Several,
    Size,
    Text,
    within,
)

Share = Annotated[float, within(0, 1e12, "rows of the other datasets would never come")]
RecomputeModule = Literal["core_attn", "mlp", "moe", "shared_experts"]


class LrMultiplier(Section):
    """Parameters whose learning rate is a multiple of their rule's."""

    pattern: Text
    """Glob over whole parameter names, such as "*.self_attention.linear_proj.weight"; it has to match one."""
    factor: PositiveFloat
    """What the learning rate is multiplied by."""


class RuleDecay(Section):
    """The weight decay of one assignment rule."""

    rule: Text
    """Name of the rule, as the assignment table prints it; it has to match a parameter."""
    weight_decay: Amount
    """In place of the rule's own: weight_decay, or 0 for norms, biases, sinks and frequencies."""


class OptimSection(Section):
    """Optimizers and the learning-rate schedule (counted in iterations)."""

    optimizer: Literal["normuon", "adam"] = "normuon"
    """"normuon": NorMuon for hidden matrices and AdamW for the rest; "adam": AdamW for everything."""
    lr: Rate
    """Peak learning rate of the hidden matrices."""
    normuon_aux_lr: Rate | None = None
    """Peak learning rate of the parameters that AdamW keeps; null: lr."""
    decoupled_lr: Rate | None = None
    """Peak learning rate of the embedding and the output layer; null: normuon_aux_lr."""
    router_lr: Rate | None = None
    """Peak learning rate of the routers' weights; null: normuon_aux_lr."""
    lr_multipliers: Several[LrMultiplier] | None = None
    """Factors on learning rates, as a list of {pattern, factor}; a parameter takes one at most. null: none."""
    min_lr: Amount = 0.0
    """Learning rate at the end of the decay; groups with another peak end at the same fraction of it."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_iters: Cardinal = 0
    """Iterations of linear warm-up from zero."""
    lr_decay_iters: Count | None = None
    """Iteration at which min_lr is reached; null: train_iters."""
    lr_wsd_decay_iters: Count | None = None
    """Length of the final decay of the WSD schedule, in iterations."""
    weight_decay: Amount = 0.1
    """Decoupled weight decay; norms, biases, sinks and frequencies have none."""
    weight_decays: Several[RuleDecay] | None = None
    """Rules with another weight decay, as a list of {rule, weight_decay}; null: none."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Decay = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: Fraction = 1e-8
    """Added to the root of AdamW's second moment."""
    clip_grad: Amount = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    normuon_momentum: Decay = 0.95
    """NorMuon's Nesterov momentum."""
    normuon_beta2: Decay = 0.95
    """Decay of NorMuon's per-row second moment."""
    normuon_eps: Fraction = 1e-10
    """Added to NorMuon's per-row second moment before the root."""
    polar_express_steps: Annotated[int, within(1, 5, "the table of coefficients ends there")] = 5
    """Polar Express iterations."""
    polar_express_safety: Amount = 2e-2
    """Headroom on the norm before the first iteration."""
    polar_express_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the iterations; "auto": bfloat16 on a GPU, float32 on a CPU."""
    normuon_momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    """What NorMuon's momentum is kept in between steps."""
    normuon_stack_mib: Size | None = None
    """Largest stack of matrices, MiB of fp32 (two to five times as much is in use); null: 3072 on a GPU, 4 on a CPU."""
    normuon_idle_expert_policy: Literal["skip", "step"] = "skip"
    """Experts without tokens in a step: "skip" leaves them as they are, "step" updates them from old momentum too."""


class ParallelSection(Section):
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: Few = 1
    """Ranks that share each matrix, by heads, feed-forward channels and vocabulary; divides the world size."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the sequence between attention and feed-forward; experts need it."""
    pipeline_model_parallel_size: Few = 1
    """Stages that the layers are cut into, each on its own ranks; Megatron's 1F1B schedule runs them."""
    num_layers_in_first_pipeline_stage: Few | None = None
    """Layers of the first stage where they are not shared out evenly; null: as many as the others."""
    num_layers_in_last_pipeline_stage: Few | None = None
    """Layers of the last stage, which has the output layer as well; null: as many as the others."""
    expert_model_parallel_size: Few = 1
    """Ranks over which the experts are spread; divides the world size and num_experts."""
    overlap_grad_reduce: bool = True
    """Sum gradients over data-parallel ranks while the backward pass still runs; false: after it."""
    nproc_per_node: Few = 1
    """Worker processes on each machine: one a GPU, or as many as pay on a CPU."""
    distributed_timeout_minutes: Annotated[int, within(1, 10_080, "a dead run would not be noticed for a week")] = 10
    """A collective that waits longer than this is taken for dead, and so is a process that gives no sign of life as it
    starts or reads a checkpoint."""


class BlendPart(Section):
    """One dataset of a blend."""

    path: Text
    """Built dataset, as data_path."""
    weight: Share
    """Its share of the rows relative to the other weights, until blend_schedule changes it; 0: none yet."""
    name: Name | None = None
    """What metrics call it; null: the last component of its path."""

    @property
    def label(self) -> str:
        """Its name, after the default."""
        return self.name or PurePath(self.path).name or self.path


class BlendChange(Section):
    """Weights that take over at a point of the run."""

    from_sample: Count
    """Consumed samples (rows) from which they hold."""
    weights: Several[Share]
    """One for each dataset, in the order of blend."""


class DataSection(Section):
    """Which tokens, in which order."""

    data_path: Text | None = None
    """Built dataset (the directory that holds manifest.json), relative to the working directory; null: see blend."""
    blend: Several[BlendPart] | None = None
    """Several datasets, as a list of {path, weight, name}: each gives rows by its weight; null: data_path."""
    blend_schedule: Several[BlendChange] | None = None
    """Other weights later in the run, as a list of {from_sample, weights}; null: those of blend throughout."""
    skip_rows: Several[Cardinal] | None = None
    """Rows to pass over at the start of each dataset's order, as another training has read them; null: none."""
    store: Text | None = None
    """Vector store that a mixture reads (vpmoe data build-store), over its embedding; null: none."""
    seq_length: Size
    """Tokens in one packed row."""
    packing_window: Size = 4096
    """Conversations among which the packer looks for the best fit."""
    data_seed: Seed = 1234
    """Seed of the order of conversations."""

    @property
    def parts(self) -> Several[BlendPart]:
        """The datasets; data_path alone is a blend of one."""
        return self.blend if self.blend else [BlendPart(path=self.data_path or "", weight=1.0)]


class TrainingSection(ObjectiveFields):
    """Length, batch, precision and objective of the run."""

    run_name: Name
    """Name of the run: letters, digits, dot, dash, underscore."""
    run_dir: Text | None = None
    """Directory of everything the run writes; null: runs/<run_name>."""
    micro_batch_size: Size
    """Rows per forward pass on one data-parallel rank."""
    global_batch_size: Size
    """Rows per optimizer step over all ranks; a multiple of micro_batch_size times the data-parallel size. With
    sampled answers these, packed into rows: a number that divides those of a sampling."""
    train_iters: Count
    """Optimizer steps of the run."""
    seed: Seed = 1234
    """Seed of the weights and of dropout-free randomness such as sampling."""
    train_only: Several[Text] | None = None
    """Globs over whole parameter names as in assignment.json; each has to match one. All other parameters stay as they
    are, bit for bit; an expert bias moves only where its router's weight is trained. null: everything is trained."""
    bf16: bool
    """Compute in bfloat16 with fp32 master weights; false: fp32 throughout."""
    compile: Literal["off", "layers", "step"] = "off"
    """"layers": torch.compile what lies around attention's scores and the experts in each layer (norms, projections,
    rotation, residuals, shared expert); "step": the choice of experts, their weights, their products and the balance
    loss as well. It takes a minute or more before the first step."""
    deterministic: bool = False
    """The same run twice gives the same bits: on the same machines, software, number of processes and of threads. On a
    CPU it does anyway; on a GPU some operations take a slower way, or end the run where there is none."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Computed again backward, not kept: whole layers ("full"), recompute_modules ("selective"), nothing (null)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Of "full": "uniform" (or null) all layers in runs of recompute_num_layers; "block" only that many of a stage."""
    recompute_num_layers: Few | None = None
    """Of "full": layers in a run whose input alone is kept, or layers recomputed in each stage; null: 1."""
    recompute_modules: Several[RecomputeModule] | None = None
    """Of "selective": any of core_attn, mlp (dense layers), moe, shared_experts; null: core_attn."""
    nonfinite_policy: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: end the run, or drop the step."""
    nonfinite_max_skips: Cardinal = 0
    """Dropped steps after which the run ends all the same."""


class CheckpointSection(Section):
    """When to save, what to keep, whether to continue."""

    save_interval: Count | None = None
    """Iterations between checkpoints; null: only at the end of the run and on a signal."""
    async_save: bool = True
    """Copy what is saved to the host's memory and write it while training goes on; false: training waits."""
    keep_last: Count = 2
    """Newest checkpoints to keep."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose iteration is a multiple of this."""
    load_weights: Text | None = None
    """Checkpoint (or run) whose weights the run starts from; its optimizer, schedule and position are left; null: none.
    A resumed run goes on from its own checkpoint."""
    load_embedding: Text | None = None
    """Checkpoint (or run) of which the run takes the embedding alone, for models that share one; null: none."""
    load_experts: Several[Text] | None = None
    """Of a mixture: checkpoints (or runs) of its experts, one of each kind, in any order, all over one embedding, which
    comes along; null: experts as they are drawn. A resumed run goes on from its own checkpoint."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the run directory."""
    strict_resume: bool = False
    """End where newer checkpoints are damaged or not there, instead of continuing from an older one."""
    allow_provenance_change: bool = False
    """Resume although the data, its order or the objective differ (never the model); the differences are printed."""


class LoggingSection(Section):
    """Metrics and thresholds on the router's health."""

    log_interval: Count = 1
    """Iterations between metric records and progress lines."""
    run_store: Text | None = None
    """SQLite file that the run registers itself in; null: $VPMOE_RUN_STORE, else runs/registry.sqlite."""
    experiment: Text | None = None
    """What the run belongs to, for lists of runs; null: the name of the folder that its directory lies in."""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: write locally, upload, or leave it out."""
    wandb_project: Text = "vpmoe"
    """Weights & Biases project."""
    moe_per_layer_logging: bool = False
    """Record router health for every layer as well as in aggregate."""
    router_max_load_warn_pct: PositiveFloat | None = None
    """Warn when the busiest expert takes more than this percentage of a layer's assignments (tokens times top-k)."""
    router_max_load_fail_pct: PositiveFloat | None = None
    """End the run when it takes more than this percentage."""
    router_dead_experts_warn: Count | None = None
    """Warn at this many experts without tokens, over all layers."""
    router_dead_experts_fail: Count | None = None
    """End the run at this many experts without tokens, over all layers."""
    router_cv_warn_pct: PositiveFloat | None = None
    """Warn when the experts' loads vary by more than this (standard deviation in % of the mean, mean over layers)."""
    router_cv_fail_pct: PositiveFloat | None = None
    """End the run when they vary by more than this."""
    router_max_vio_warn: PositiveFloat | None = None
    """Warn when the busiest expert's load exceeds its layer's mean by more than this many times the mean."""
    router_max_vio_fail: PositiveFloat | None = None
    """End the run when it exceeds the mean by more than this many times the mean."""
