"""vpMoE for ``transformers``: every rung, with a key-value cache, generation and left-padded batches.

Copied into every exported directory, so it imports nothing of ours.

Shapes: B rows, S new tokens, K keys, C hidden.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_vpmoe import VpMoeConfig
from .layers_vpmoe import (
    VpMoeAttention,
    VpMoeExperts,
    VpMoeFeedForward,
    VpMoeRMSNorm,
    VpMoeRouter,
    VpMoeSparseFeedForward,
)


class VpMoeLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: VpMoeConfig, number: int):
        super().__init__()
        self.input_layernorm = VpMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attention = VpMoeAttention(config, number)
        self.pre_mlp_layernorm = VpMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.is_moe_layer(number)
        self.mlp = VpMoeSparseFeedForward(config) if sparse else VpMoeFeedForward(config, config.intermediate_size)

    def forward(self, x_BSC, position_BS, real_BK, first_value, cache):
        attended, value = self.self_attention(self.input_layernorm(x_BSC), position_BS, real_BK, first_value, cache)
        x_BSC = x_BSC + attended
        x_BSC = x_BSC + self.mlp(self.pre_mlp_layernorm(x_BSC))
        return x_BSC, value if first_value is None else first_value


class VpMoePreTrainedModel(PreTrainedModel):
    """What the models share with ``transformers``."""

    config_class = VpMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["VpMoeLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["sink", "grape_log_freq", "value_residual_scale", "expert_bias"]  # noqa: RUF012

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, VpMoeRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, VpMoeRouter):
            nn.init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                nn.init.zeros_(module.expert_bias)
        elif isinstance(module, VpMoeExperts):
            for name, parameter in module.named_parameters():
                (nn.init.zeros_ if name.endswith("bias") else nn.init.normal_)(parameter)
        elif isinstance(module, VpMoeAttention) and module.positions == "grape_m":
            base, scale = self.config.rotary_base, self.config.grapem_log_freq_scale
            exponent = torch.arange(0, module.dim, 2) / module.dim
            with torch.no_grad():
                module.grape_log_freq.copy_(-scale * math.log(base) * exponent)


class VpMoeModel(VpMoePreTrainedModel):
    """Embedding, layers, norm."""

    def __init__(self, config: VpMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(VpMoeLayer(config, n) for n in range(1, config.num_hidden_layers + 1))
        self.norm = VpMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: Cache | None = None,
        inputs_embeds=None,
        use_cache=None,
        **_kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows, new = hidden.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + new, dtype=torch.bool, device=hidden.device)
        elif attention_mask.dim() != 2 or attention_mask.shape[1] != past + new:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; [{rows}, {past + new}] is needed: every past "
                "and new token of each row, 0 on padding"
            )
        real_BK = attention_mask.bool()
        if position_ids is None:
            position_ids = (real_BK.long().cumsum(1) - 1).clamp(min=0)
        position_BS = position_ids[:, -new:].expand(rows, -1)
        first_value = None
        for layer in self.layers:
            hidden, first_value = layer(hidden, position_BS, real_BK, first_value, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class VpMoeForCausalLM(VpMoePreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: VpMoeConfig):
        super().__init__(config)
        self.model = VpMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
