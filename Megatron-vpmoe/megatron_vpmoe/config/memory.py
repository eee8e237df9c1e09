"""How much memory one process of a run takes at the most, by arithmetic; `tests/gpu_shape` holds it to a count."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vpmoe.config.buffers import Held, held_buckets
from megatron_vpmoe.config.expert_formats import FORMATS
from megatron_vpmoe.config.geometry import parameter_count, stage_layers, tensor_parallel_rank
from megatron_vpmoe.config.layer_geometry import layer_geometries
from megatron_vpmoe.config.parameters import EMBEDDING, OUTPUT, ROUTED, is_trained, parameter_sizes
from megatron_vpmoe.config.rules import idle_lines
from megatron_vpmoe.config.schema import RunConfig

_FP32 = 4
STACK_BYTES = {"cpu": 4 * 2**20, "cuda": 3 * 2**30}  # of NorMuon's largest stack, where none is named
FILL_FLOPS = {"cpu": 0.0, "cuda": 4e11}  # of zeros in a stack of matrices of few rows: under a millisecond
LOGITS_CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}  # of the cross-entropy at one time
_POSITION_BYTES = 30  # of a batch: three times int64, an int32, a bool and a byte
DECODED_ROWS = 32  # answers that the engine of ``generation`` grows at once
_PROCESS_BYTES = 350 * 2**20  # interpreter, torch and megatron.core of one worker, as measured on Linux


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a step, by purpose."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All purposes together."""
        return sum(self.parts.values())


def _held(cfg: RunConfig, layers: range) -> int:
    """Parameters of ``layers`` that a rank holds, experts spread; ``cfg`` is the rank's."""
    experts = cfg.parallel.expert_model_parallel_size
    return sum(size // experts if ROUTED in name else size for name, size in parameter_sizes(cfg, layers).items())


def _expert_rows(cfg: RunConfig) -> float:
    """Rows of experts for each token: its choices, with the padding of a narrow format."""
    moe, tokens = cfg.moe, cfg.training.micro_batch_size * cfg.data.seq_length
    if moe.experts_precision is None:
        return moe.moe_router_topk
    experts = (moe.num_experts or 0) // cfg.parallel.expert_model_parallel_size
    return FORMATS[moe.experts_precision].places(tokens * moe.moe_router_topk, experts) / tokens


def _layer_activations(cfg: RunConfig, layer_number: int, compute_bytes: int, on_cpu: bool) -> dict[str, int]:
    """Bytes per token that one layer of a process keeps for its backward pass, by the part that can be recomputed."""
    m, moe = cfg.model, cfg.moe
    if m.layer_type == "state_space":
        return {"rest": _state_space_activations(cfg, compute_bytes)}
    heads, qkv = m.num_attention_heads, (m.num_attention_heads + 2 * m.num_query_groups) * m.kv_channels
    # Outside attention and feed-forward, and in the experts, a rank has its part of the sequence alone.
    parts_of_sequence = cfg.parallel.tensor_model_parallel_size if cfg.parallel.sequence_parallel else 1
    rest = 4 * m.hidden_size // parts_of_sequence + 3 * qkv + heads * m.kv_channels
    if cfg.is_tpa_layer(layer_number):
        rest += (m.tpa_q_rank + 2 * m.tpa_rank) * m.kv_channels
    parts = {"rest": rest * compute_bytes}
    inner = 4 if m.activation == "swiglu" else 3  # a gate has its own output
    if cfg.is_moe_layer(layer_number):
        chosen = _expert_rows(cfg) * (2 * m.hidden_size + inner * moe.moe_ffn_hidden_size) * compute_bytes
        parts["moe"] = round(chosen / parts_of_sequence)
        parts["shared_experts"] = inner * (moe.moe_shared_expert_intermediate_size or 0) * compute_bytes
    else:
        parts["mlp"] = inner * m.ffn_hidden_size * compute_bytes
    windowed = not cfg.is_global_layer(layer_number) and cfg.position_embedding(layer_number) != "grape_a"
    backend = m.attention_backend
    if backend == "auto":
        backend = "flex" if not on_cpu else "banded" if windowed else "sdpa"
    if backend == "reference":
        scores = 2 * heads * cfg.data.seq_length  # the scores and their softmax
    elif backend == "flex":
        scores = 2 * heads  # the log-sum-exp and the sink's weight
    elif backend == "banded":
        keys = min(cfg.data.seq_length, 2 * (m.window_size or 0))
        scores = 2 * keys * (1 if on_cpu else heads)  # the mask of each block; off the CPU scores and softmax as well
    else:
        scores = (1 if windowed else heads) * cfg.data.seq_length  # the mask, with each head's bias on distance
    parts["core_attn"] = scores * _FP32 + heads * m.kv_channels * compute_bytes
    if m.layer_type == "denoiser":  # clean tokens and noisy ones, and at each of these what its level sets
        parts = {name: 2 * size for name, size in parts.items()}
        parts["rest"] += 10 * m.hidden_size * compute_bytes
    return parts


def _state_space_activations(cfg: RunConfig, compute_bytes: int) -> int:
    """Of a mixer: the norm's input and output, what the convolution's taps read, what the activations and the gate
    read, and in fp32 what the scan reads, with a state every 16 tokens.
    """
    m = cfg.model
    inner = (m.ssm_conv_size - 1) + 8
    of_scan = (5 + m.ssm_state_size / 16) * m.ssm_inner_size + 2 * m.ssm_state_size
    return round((3 * m.hidden_size + inner * m.ssm_inner_size) * compute_bytes + of_scan * _FP32)


def _activations(cfg: RunConfig, numbers: range, compute_bytes: int, on_cpu: bool) -> tuple[int, int]:
    """Bytes per token of one stage: what it keeps of a micro-batch, and what stands while a part runs again."""
    if cfg.model.layer_type == "mixture":
        return _mixture_activations(cfg, compute_bytes, on_cpu)
    training, count = cfg.training, len(numbers)
    layers = [_layer_activations(cfg, n, compute_bytes, on_cpu) for n in numbers]
    whole = [sum(parts.values()) for parts in layers]
    if training.recompute_granularity is None:
        return sum(whole), 0
    if training.recompute_granularity == "selective":
        again = set(training.recompute_modules or ("core_attn",))
        again |= {"shared_experts"} if "moe" in again else set()
        freed = [sum(size for part, size in parts.items() if part in again) for parts in layers]
        return sum(whole) - sum(freed), max(freed)
    run = min(training.recompute_num_layers or 1, count)
    kept_input = cfg.model.hidden_size * compute_bytes
    if training.recompute_method == "block":
        kept = sum(whole[run:])  # gone by the time that the first layers run again
        return run * kept_input + kept, max(0, max(whole[:run]) - kept)
    return -(-count // run) * kept_input, max(sum(whole[i : i + run]) for i in range(0, count, run))


def _mixture_activations(cfg: RunConfig, compute_bytes: int, on_cpu: bool) -> tuple[int, int]:
    """Of a mixture: its attention, whose scores are kept in fp32, and each expert, which is recomputed whole."""
    m = cfg.model
    inner = m.num_attention_heads * 3 * (m.kv_channels + m.qk_pos_emb_head_dim) + 2 * m.kv_lora_rank
    own = (4 * m.hidden_size + inner) * (
        compute_bytes + _FP32
    ) + 3 * m.num_attention_heads * cfg.data.seq_length * _FP32
    experts = []
    for expert in m.mixture_experts or ():
        alone = cfg.of_expert(expert)
        numbers = range(1, expert.num_layers + 1)
        whole = sum(sum(_layer_activations(alone, n, compute_bytes, on_cpu).values()) for n in numbers)
        if expert.layer_type == "denoiser":
            # Alone it runs twice, the second time with a level at each token; here again for each step of DDIM.
            whole -= expert.num_layers * 10 * m.hidden_size * compute_bytes
            whole = whole * (1 + m.ddim_steps) // 2
        experts.append(whole)
    if cfg.training.recompute_granularity is None:
        return own + sum(experts), 0
    return own + len(experts) * 2 * m.hidden_size * compute_bytes, max(experts)


def _loss(cfg: RunConfig, compute_bytes: int, on_cpu: bool) -> int:
    """Bytes that the loss takes at most: the trained output projection's gradient, and with it first a chunk's logits
    and probabilities, then the zeros that autograd is handed in its place.
    """
    vocab = cfg.model.padded_vocab_size // cfg.parallel.tensor_model_parallel_size
    tokens = cfg.training.micro_batch_size * cfg.data.seq_length
    softmaxes = 2 if cfg.training.objective == "topk_kd" and cfg.training.kd_temperature != 1 else 1
    chunk = min(tokens * vocab * (softmaxes * _FP32 + compute_bytes), LOGITS_CHUNK_BYTES["cpu" if on_cpu else "cuda"])
    projection = OUTPUT if cfg.model.untie_embeddings_and_output_weights else EMBEDDING
    elements = is_trained(cfg, projection) * vocab * cfg.model.hidden_size
    return max(chunk, elements * compute_bytes) + elements * _FP32


def _batches(cfg: RunConfig) -> int:
    """Bytes of a process's rows of a step, and of the next one's that are made meanwhile (see ``data.batch``)."""
    p, t = cfg.parallel, cfg.training
    replicas = max(1, p.nproc_per_node // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size))
    by_ids = t.objective == "topk_kd" or (t.objective, t.opd_loss) == ("on_policy", "topk")
    of_teacher = (2 * t.kd_top_k + 1) * _FP32 if by_ids else 0
    return 2 * cfg.training.global_batch_size * cfg.data.seq_length * (_POSITION_BYTES + of_teacher) // replicas


def _sampling(cfg: RunConfig, layers: range, compute_bytes: int) -> int:
    """Bytes that a sampling holds, of rollouts or of suites: keys and values of rows that fill the context, and logits.

    ``cfg`` is the rank's.
    """
    m, r, length = cfg.model, cfg.rollouts, cfg.data.seq_length
    if not (cfg.samples or cfg.evaluation.eval_suites):
        return 0
    columns = sum(1 + (length if cfg.is_global_layer(n) else min(length, m.window_size or length)) for n in layers)
    keys_values = 2 * columns * m.num_query_groups * m.kv_channels * compute_bytes
    if m.layer_type == "state_space":
        kept = (m.ssm_conv_size - 1) * compute_bytes + m.ssm_state_size * _FP32
        keys_values = len(layers) * m.ssm_inner_size * kept
    if m.layer_type == "mixture":  # of growing parts for each token, of others once
        layers_of = layer_geometries(cfg)
        once = m.hidden_size + sum(layer.state_size or 0 for layer in layers_of)
        keys_values = length * sum(layer.cache_bytes for layer in layers_of) + once * _FP32
    answers = r.rollout_groups * max(cfg.group_sizes, default=1)
    rows = DECODED_ROWS if cfg.evaluation.eval_suites else min(DECODED_ROWS, answers)
    return rows * (keys_values + m.padded_vocab_size * _FP32)


def _optimizer_state(cfg: RunConfig, buckets: list[Held]) -> int:
    """Bytes of the largest share of the optimizer state.

    NorMuon keeps one moment a matrix entry, AdamW two; bf16 parameters have an fp32 master copy.
    """
    moment = 2 if cfg.optim.normuon_momentum_dtype == "bfloat16" else _FP32
    of_matrix = moment if cfg.optim.optimizer == "normuon" else 2 * _FP32
    master = _FP32 if cfg.training.bf16 else 0
    return sum(held.slice * (master + (2 * _FP32 if held.kind == "rows" else of_matrix)) for held in buckets)


def _update(cfg: RunConfig, buckets: list[Held], on_cpu: bool) -> tuple[int, int]:
    """Bytes that NorMuon's buffers keep from step to step, on a CPU alone, and what an update takes beside them.

    Buffers are a stack of matrices in fp32, twice in what Polar Express computes in, and products of rows with rows. Of
    dense matrices gradients, momenta and weights are gathered beside them.
    """
    o, device = cfg.optim, "cpu" if on_cpu else "cuda"
    if o.optimizer != "normuon":
        return 0, 0
    stack = STACK_BYTES[device] if o.normuon_stack_mib is None else o.normuon_stack_mib * 2**20
    held = {kind: _FP32 * sum(each.slice for each in buckets if each.kind == kind) for kind in ("matrices", "experts")}
    # Into the experts are one matrix or, with a gate, two of one shape; out of them is one.
    into = 2 / 3 if cfg.model.activation == "swiglu" else 1 / 2
    dense, experts = min(stack, held["matrices"]), min(stack, round(into * held["experts"]))
    in_bf16 = o.polar_express_dtype == "bfloat16" or (o.polar_express_dtype == "auto" and not on_cpu)
    copies = 2 if in_bf16 else 3
    if on_cpu:
        return copies * max(experts, dense), 3 * max(experts, dense)
    narrow = min(1.0, cfg.moe.moe_ffn_hidden_size / cfg.model.hidden_size) if experts else 0.0
    return 0, max(round((copies + (copies - 1) * narrow) * experts), (3 + copies) * dense)


def memory_estimate(
    cfg: RunConfig, *, on_cpu: bool = False, teacher: RunConfig | None = None, world: int | None = None
) -> MemoryEstimate:
    """Memory of one process of the run; of a pipeline, that of the stage that needs most.

    Gradients are accumulated in fp32; frozen parameters have none, and no optimizer state. Activations are what
    recomputation leaves of one micro-batch (as if everything were trained), and the inside of the largest recomputed
    part; of P stages the first keeps P micro-batches under way, the last one.

    Args:
        cfg: the run.
        on_cpu: the machine has no GPU, which decides the attention backend that "auto" takes.
        teacher: ``cfg`` with the geometry of ``training.teacher_weights``, whose parameters are counted; None: none.
        world: processes of the run; None: those of one machine, more leave less to each.
    """
    cfg = tensor_parallel_rank(cfg)
    stages = stage_layers(cfg)
    estimates = [_stage_estimate(cfg, layers, len(stages) - i, on_cpu, world) for i, layers in enumerate(stages)]
    estimate = max(estimates, key=lambda estimate: estimate.total)
    if teacher is not None:
        held = _held(tensor_parallel_rank(teacher), range(1, teacher.model.num_layers + 1))
        estimate.parts["teacher"] = held * _frozen_bytes(cfg)
    return estimate


def _frozen_bytes(cfg: RunConfig) -> int:
    return 2 if cfg.training.bf16 or cfg.training.reference_bf16 else _FP32


def _stage_estimate(cfg: RunConfig, layers: range, under_way: int, on_cpu: bool, world: int | None) -> MemoryEstimate:
    m, t, is_last = cfg.model, cfg.training, layers.stop == cfg.model.num_layers + 1
    held = _held(cfg, layers)
    buckets = held_buckets(cfg, layers, world=world, on_cpu=on_cpu)
    # Of one rank alone, parameters stay where they are.
    padding = sum(x.weight_bytes * (x.bucket.size - x.bucket.elements) for x in buckets if x.ranks > 1)
    compute_bytes, tokens = 2 if t.bf16 else _FP32, t.micro_batch_size * cfg.data.seq_length
    kept, transient = _activations(cfg, layers, compute_bytes, on_cpu)
    if layers.start > 1:  # what the stage before has sent
        kept += (m.hidden_size + m.value_residual * m.num_query_groups * m.kv_channels) * compute_bytes
    loss = _loss(cfg, compute_bytes, on_cpu) if is_last else 0
    activations = tokens * under_way * kept + max(0, tokens * transient - loss)  # nothing runs again before it is gone
    buffers, update = _update(cfg, buckets, on_cpu)
    beside, sampling = cfg.rollouts.rollout_staleness > 0, _sampling(cfg, layers, compute_bytes)
    if not beside:  # but between two updates: what it takes above what a micro-batch does
        sampling = max(0, sampling - activations - loss)
    return MemoryEstimate(
        {
            "parameters": held * compute_bytes + padding,
            **({"reference": held * _frozen_bytes(cfg)} if t.reference_weights else {}),
            "gradients": sum(each.bucket.size for each in buckets) * _FP32,
            "optimizer state": _optimizer_state(cfg, buckets),
            "optimizer's buffers": buffers,
            "activations": activations,
            "loss": loss,
            **({"update, beyond those two": update} if (update := max(0, update - activations - loss)) else {}),
            **({"weights that sample": held * compute_bytes} if beside else {}),
            **({"sampling" if beside else "sampling, beyond those two": sampling} if sampling else {}),
            "batches": _batches(cfg) if on_cpu else 0,  # else in the machine's memory
            "process": _PROCESS_BYTES,
        }
    )


def gib(count: float) -> str:
    """Bytes, as text."""
    return f"{count / 2**30:,.2f} GiB"


def describe_geometry(cfg: RunConfig, *, on_cpu: bool = False, teacher: RunConfig | None = None) -> str:
    """What a dry run prints: parameters, memory, and the fields of the architecture that change nothing."""
    count, memory = parameter_count(cfg), memory_estimate(cfg, on_cpu=on_cpu, teacher=teacher)
    rows = [*count.parts.items(), ("total", count.total), ("active per token", count.active)]
    rows.append(("active without embeddings", count.active_without_embeddings))
    lines = ["parameters", *(f"  {name:<26}{value:>16,}" for name, value in rows)]
    lines += ["memory of one process", *(f"  {name:<26}{gib(value):>16}" for name, value in memory.parts.items())]
    lines += [f"  {'total':<26}{gib(memory.total):>16}"]
    idle = [f"  {line}" for line in idle_lines(cfg)]
    return "\n".join([*lines, *(["idle here", *idle] if idle else [])])
