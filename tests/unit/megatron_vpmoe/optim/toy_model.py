"""A small model with every kind of parameter that rules assign, and a configuration for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_vpmoe.runtime import device

device.prepare()
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

HIDDEN, EXPERTS, FFN, VOCAB = 16, 4, 8, 24


def toy_config(*, bf16: bool = False, **optim: Any) -> Any:
    """The fields that the optimizer reads; keyword arguments replace those of section ``optim``."""
    fields = {
        "optimizer": "normuon", "lr": 0.02, "min_lr": 0.002, "lr_decay_style": "cosine", "lr_warmup_iters": 2,
        "lr_wsd_decay_iters": None, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8,
        "clip_grad": 1.0, "normuon_momentum": 0.95, "normuon_beta2": 0.95, "normuon_eps": 1e-10,
        "polar_express_steps": 5, "polar_express_safety": 2e-2, "normuon_idle_expert_policy": "skip",
        "polar_express_dtype": "auto", "normuon_momentum_dtype": "float32", "normuon_stack_mib": None,
        "lr_multipliers": None, "weight_decays": None,
    } | optim  # fmt: skip
    return SimpleNamespace(
        optim=SimpleNamespace(**fields),
        training=SimpleNamespace(bf16=bf16),
        aux_lr=0.01,
        embedding_lr=0.005,
        router_lr=0.003,
        decay_iters=20,
    )


class ToyExperts(MegatronModule):
    """Stacked experts, sharded over expert-parallel ranks along axis 0."""

    def __init__(self, config: TransformerConfig, rank: int, ranks: int) -> None:
        super().__init__(config)
        self.rank, self.ranks = rank, ranks
        local = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        self.fc1_weight = torch.nn.Parameter(torch.randn(EXPERTS, FFN, HIDDEN)[local].clone())
        self.fc2_weight = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, FFN)[local].clone())
        self.fc1_bias = torch.nn.Parameter(torch.randn(EXPERTS, FFN)[local].clone())
        for param in self.parameters():
            param.allreduce = False  # type: ignore[attr-defined]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        return {
            prefix + name: ShardedTensor.from_rank_offsets(prefix + name, param, (0, self.rank, self.ranks))
            for name, param in self.named_parameters()
        }


class ToyLayer(MegatronModule):
    """The parameter names of one layer; Q, K and V are interleaved in two query groups of 4 + 2 + 2 rows."""

    def __init__(self, config: TransformerConfig, rank: int, ranks: int) -> None:
        super().__init__(config)
        self.input_layernorm = torch.nn.RMSNorm(HIDDEN)
        self.self_attention = MegatronModule(config)
        self.self_attention.linear_qkv = torch.nn.Linear(HIDDEN, 16)
        self.self_attention.linear_proj = torch.nn.Linear(HIDDEN, HIDDEN)
        rows = torch.arange(16).view(2, 8)
        self.self_attention.linear_qkv.weight.matrix_rows = (  # type: ignore[attr-defined]
            rows[:, :4].flatten(), rows[:, 4:6].flatten(), rows[:, 6:].flatten()
        )  # fmt: skip
        self.self_attention.sink = torch.nn.Parameter(torch.zeros(4))
        self.self_attention.value_residual_scale = torch.nn.Parameter(torch.ones(()))
        self.mlp = MegatronModule(config)
        self.mlp.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.mlp.experts = ToyExperts(config, rank, ranks)


class ToyModel(MegatronModule):
    """Two layers between an embedding and an untied output layer; it has no forward, tests set the gradients."""

    def __init__(self, *, bf16: bool = False, rank: int = 0, ranks: int = 1) -> None:
        config = TransformerConfig(num_layers=2, hidden_size=HIDDEN, num_attention_heads=4)
        super().__init__(config)
        self.rank = rank
        self.embedding = MegatronModule(config)
        self.embedding.word_embeddings = torch.nn.Embedding(VOCAB, HIDDEN)
        self.decoder = MegatronModule(config)
        # Not a ModuleList: Megatron's default sharded_state_dict would not ask the modules inside one.
        self.decoder.layers = MegatronModule(config)
        for layer in range(2):
            self.decoder.layers.add_module(str(layer), ToyLayer(config, rank, ranks))
        self.decoder.final_layernorm = torch.nn.RMSNorm(HIDDEN)
        self.output_layer = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        if bf16:
            for name, param in self.named_parameters():
                if not name.endswith(("sink", "value_residual_scale")):
                    param.data = param.data.bfloat16()

    def set_gradients(self, seed: int, scale: float = 1.0) -> None:
        """Draw ``main_grad`` of every parameter; experts take their slice of the gradient of all of them."""
        generator = torch.Generator().manual_seed(seed)
        for _name, param in self.named_parameters():
            if getattr(param, "allreduce", True):
                grad = torch.randn(param.shape, generator=generator)
            else:
                grad = torch.randn((EXPERTS, *param.shape[1:]), generator=generator)
                grad = grad.narrow(0, self.rank * param.shape[0], param.shape[0]).clone()
            if hasattr(param, "main_grad"):  # which belongs to a buffer
                param.main_grad.copy_(grad * scale)
            else:
                param.main_grad = grad * scale  # type: ignore[attr-defined]
