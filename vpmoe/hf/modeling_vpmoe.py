"""vpMoE for ``transformers``: every rung, with key-value caches, generation, padded and padding-free batches.

Copied into every exported directory, so it imports nothing of ours.

Shapes: B rows, S new tokens, T past and new tokens, C hidden.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_vpmoe import VpMoeConfig
from .layers_vpmoe import (
    VpMoeAttention,
    VpMoeFeedForward,
    VpMoeRMSNorm,
    VpMoeSparseFeedForward,
    VpMoeTokens,
)


def real_tokens(attention_mask, rows, total, device):
    """Bool [B, T], False on padding.

    Raises:
        ValueError: another shape (a prepared mask of four dimensions), or other values than 0 and 1.
    """
    if attention_mask is None:
        return torch.ones(rows, total, dtype=torch.bool, device=device)
    if attention_mask.dim() != 2 or attention_mask.shape[0] not in (1, rows) or attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; [{rows}, {total}] is needed: every past "
            "and new token of each row, 0 on padding"
        )
    if ((attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError(
            "attention_mask has other values than 0 (padding) and 1; documents that share a row are told apart by "
            "position_ids that start again from 0"
        )
    return attention_mask.to(device).bool().expand(rows, -1)


def placed(position_ids, real_BT, past, cached_B=None):
    """Where the tokens stand; without ``position_ids`` a row is one document.

    Args:
        position_ids: [B or 1, S], of the new tokens: going up by one, and from 0 again where a document begins. On
            padding they mean nothing.
        real_BT: from ``real_tokens``.
        past: tokens in the cache, T - S.
        cached_B: ``first_BS`` of the last tokens in the cache, where that is known.

    Raises:
        ValueError: another shape, or positions that contradict themselves or the mask.
    """
    rank_BT = real_BT.long().cumsum(1) - 1
    rank, real = rank_BT[:, past:], real_BT[:, past:]
    if position_ids is None and cached_B is not None and cached_B.any():
        raise ValueError("the cache holds rows of several documents: position_ids have to say that the last goes on")
    if position_ids is None:
        return VpMoeTokens(real_BT, rank_BT, rank.clamp(min=0), torch.zeros_like(rank))
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, len(rank)) or position_ids.shape[1] != rank.shape[1]:
        raise ValueError(
            f"position_ids have shape {list(position_ids.shape)}; {list(rank.shape)} is needed: the new tokens of "
            "each row"
        )
    position = position_ids.to(rank.device).long().expand(len(rank), -1).masked_fill(~real, 0)
    first = rank - position
    # The document that each token has to be of: the last one that began here, or the one that the cache ends with.
    begun = rank.masked_fill(~real | (position > 0), -1).cummax(1).values
    rest_of_past = real & (begun < 0)
    before = first.masked_fill(~rest_of_past, rank_BT.shape[1]).amin(1, keepdim=True)
    if cached_B is not None and len(cached_B) == len(rank):
        before = torch.where(cached_B[:, None] < rank[:, :1], cached_B[:, None], before)  # or it was cropped since
    wrong = real & ((first != torch.where(begun < 0, before, begun)) | (first < 0) | (position < 0))
    if wrong.any():
        row, at = wrong.nonzero()[0].tolist()
        earlier = position[row, :at][real[row, :at]].tolist()
        allowed = [earlier[-1] + 1] if earlier else [(rank - before.clamp(min=0))[row, at].item()] if past else []
        raise ValueError(
            f"position_ids of row {row} have {position[row, at].item()} at new token {at}; "
            f"{' or '.join(map(str, [*allowed, 0]))} is needed after {rank[row, at].item()} real tokens: "
            "positions go up by one over the tokens that attention_mask calls real, and from 0 again in each document"
        )
    return VpMoeTokens(real_BT, rank_BT, position, first.masked_fill(~real, 0))


class VpMoeLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: VpMoeConfig, number: int):
        super().__init__()
        self.input_layernorm = VpMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attention = VpMoeAttention(config, number)
        self.pre_mlp_layernorm = VpMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.is_moe_layer(number)
        self.mlp = VpMoeSparseFeedForward(config) if sparse else VpMoeFeedForward(config, config.intermediate_size)

    def forward(self, x_BSC, tokens, first_value, cache):
        attended, value, weight = self.self_attention(self.input_layernorm(x_BSC), tokens, first_value, cache)
        x_BSC = x_BSC + attended
        x_BSC = x_BSC + self.mlp(self.pre_mlp_layernorm(x_BSC))
        return x_BSC, value if first_value is None else first_value, weight


class VpMoePreTrainedModel(PreTrainedModel):
    """What the models share with ``transformers``."""

    config_class = VpMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["VpMoeLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["sink", "grape_log_freq", "value_residual_scale", "expert_bias"]  # noqa: RUF012

    def _init_weights(self, module):
        """Matrices, stacks of experts too, by ``initializer_range``; the rest where training starts it."""
        for name, parameter in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "grape_log_freq":
                pairs = len(parameter)
                exponent = torch.arange(pairs, dtype=torch.float64, device=parameter.device) / pairs
                scale = -self.config.grapem_log_freq_scale * math.log(self.config.rotary_base)
                init.copy_(parameter, exponent * scale)
            elif name == "value_residual_scale" or isinstance(module, VpMoeRMSNorm):
                init.ones_(parameter)
            elif name == "sink" or name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=self.config.initializer_range)


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
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        """``transformers``' arguments and outputs; ``position_ids`` that start again keep documents of a row apart.

        Hidden states are the embedding and each layer's output, the last one after the norm. Attentions are over the
        keys that a layer holds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        rows, new = hidden.shape[:2]
        cached_B = getattr(past_key_values, "vpmoe_document_B", None) if past else None
        tokens = placed(position_ids, real_tokens(attention_mask, rows, past + new, hidden.device), past, cached_B)
        if past_key_values is not None:
            last_B = tokens.first_BS.amax(1)
            if cached_B is not None and len(cached_B) == rows:
                last_B = torch.maximum(last_B, cached_B)
            setattr(past_key_values, "vpmoe_document_B", last_B)  # noqa: B010
        config = self.config
        keep_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = config.output_attentions if output_attentions is None else output_attentions
        states, weights, first_value = [hidden], [], None
        for layer in self.layers:
            hidden, first_value, weight = layer(hidden, tokens, first_value, past_key_values)
            if keep_states:
                states.append(hidden)
            if keep_weights:
                weights.append(weight)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if keep_states else None,
            attentions=tuple(weights) if keep_weights else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class VpMoeForCausalLM(VpMoePreTrainedModel, GenerationMixin):
    """The language model."""

    # Trainer's word for taking num_items_in_batch.
    accepts_loss_kwargs = True
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
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        num_items_in_batch=None,
        ignore_index=-100,
        shift_labels=None,
    ):
        """``VpMoeModel``'s, with logits, and the loss of ``labels`` (shifted here) or ``shift_labels``."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **_everything_else):
        """Static caches get the mask of every other call: ``forward`` makes its own from it."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config):
        """Never: which experts run depends on the tokens, so a step is no one graph."""
        if generation_config.compile_config is not None:
            raise ValueError("compile_config: this model's steps are not compiled; leave it out")
        return False
