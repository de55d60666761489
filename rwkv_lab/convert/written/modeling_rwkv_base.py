"""What RWKV-5, 6 and 7 share, for transformers: configuration, state, blocks, and the language model around them.

Plain torch. Parameters carry the names and shapes of BlinkDL's checkpoints: matrices lie as [out, in], low-rank pairs
as [in, rank] and [rank, out], vectors as [1, 1, C]. C = hidden_size, A = attention_hidden_size, N = head_size,
H = A / N.

`attention_mask` is 0 where a batch is padded. Padding leaves the state as it is; it belongs on the left, since the
state that a text leaves is the one after its last column.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

RESCALE_EVERY = 6  # layers of a float16 model after which x is halved, so that it does not overflow; not in RWKV-7


class RwkvPlainConfig(PretrainedConfig):
    """Dimensions of an RWKV model. `ranks` are those of its low-rank pairs, by name.

    `bonus_name` is what RWKV-5 calls its bonus ("time_first" holds its logarithm), `tuned_state` says whether every
    layer has an initial state of its own.
    """

    model_type = "rwkv_plain"

    def __init__(
        self,
        version: str = "7.0",
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        attention_hidden_size: int = 768,
        intermediate_size: int = 3072,
        head_size: int = 64,
        ranks: dict | None = None,
        group_norm_eps: float = 64e-5,
        bonus_name: str = "time_faaaa",
        tuned_state: bool = False,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.version, self.vocab_size = version, vocab_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.attention_hidden_size, self.intermediate_size = attention_hidden_size, intermediate_size
        self.head_size, self.num_attention_heads = head_size, attention_hidden_size // head_size
        self.ranks, self.group_norm_eps = dict(ranks or {}), group_norm_eps
        self.bonus_name, self.tuned_state, self.use_cache = bonus_name, tuned_state, use_cache
        others.pop("num_attention_heads", None)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **others,
        )


class LayerState(NamedTuple):
    """What a layer remembers of the tokens so far."""

    att_shift: Tensor  # [B,C]
    ffn_shift: Tensor  # [B,C]
    wkv: Tensor  # [B,H,V,K], float32


@dataclass
class RwkvPlainOutput(ModelOutput):
    """`state` is one `LayerState` per layer; pass it to the next call to go on."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: tuple[LayerState, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 1, size))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def previous(x: Tensor, shift: Tensor) -> Tensor:
    """x of the token before, [B,T,C]; `shift` [B,C] is the one before the first."""
    return torch.cat([shift.unsqueeze(1), x[:, :-1]], dim=1)


def head_norm(y: Tensor, ln_x: nn.GroupNorm) -> Tensor:
    """GroupNorm over the heads of y [B,T,H,N] -> [B,T,A]."""
    y = F.layer_norm(y, y.shape[-1:], eps=ln_x.eps).flatten(2)
    return y * ln_x.weight.to(y.dtype) + ln_x.bias.to(y.dtype)


def into_residual(last: nn.Module, x: Tensor, layer: int) -> Tensor:
    """The last matrix of a time mix or channel mix, scaled down where a float16 model has halved x before."""
    if x.dtype == torch.float16:
        x = x * 0.5 ** (layer // RESCALE_EVERY)
    return last(x)


def decaying_attention(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, bonus: Tensor, state: Tensor) -> Any:
    """The recurrence of RWKV-5 and 6 (arXiv 2404.05892), token by token.

    `y_t = (S_{t-1} + v_t (bonus * k_t)^T) r_t`, `S_t = S_{t-1} diag(exp(log_decay_t)) + v_t k_t^T`; r, log_decay, k and
    v are [B,T,H,N], the state [B,H,V,K], all in the state's dtype.
    """
    decay, y = log_decay.exp(), []
    for t in range(r.shape[1]):
        r_t, k_t, v_t = r[:, t], k[:, t], v[:, t]
        y.append((state @ r_t[..., None]).squeeze(-1) + (r_t * bonus * k_t).sum(-1, keepdim=True) * v_t)
        state = state * decay[:, t, :, None, :] + v_t[..., None] * k_t[:, :, None, :]
    return torch.stack(y, dim=1), state


class Block(nn.Module):
    """`blocks.i`: time mix and channel mix, each behind a LayerNorm and added to what came in."""

    def __init__(self, config: RwkvPlainConfig, layer: int, att: nn.Module, ffn: nn.Module):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.hidden_size)  # applied to the embedding
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        self.att, self.ffn = att, ffn
        self.halves = config.version != "7.0" and layer % RESCALE_EVERY == RESCALE_EVERY - 1

    def forward(self, x: Tensor, state: LayerState, v_first: Tensor | None, mask: Tensor | None) -> Any:
        """x [B,T,C], v_first [B,T,A] (RWKV-7, from its first layer on), mask [B,T,1] with 0 for padding."""
        x_att = self.ln1(x) if mask is None else self.ln1(x) * mask
        y, wkv, v_first = self.att(x_att, state.att_shift, state.wkv, v_first, mask)
        x = x + y
        x_ffn = self.ln2(x) if mask is None else self.ln2(x) * mask
        x = x + self.ffn(x_ffn, state.ffn_shift)
        if self.halves and x.dtype == torch.float16:
            x = x / 2
        return x, LayerState(x_att[:, -1], x_ffn[:, -1], wkv), v_first


class RwkvPlainForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model; each generation states its time mix and channel mix."""

    config_class = RwkvPlainConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # a state cannot be taken back by some tokens, as assisted generation would have to
    time_mix: type[nn.Module]
    channel_mix: type[nn.Module]

    def __init__(self, config: RwkvPlainConfig):
        super().__init__(config)
        C, V = config.hidden_size, config.vocab_size
        self.emb = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(
            Block(config, i, self.time_mix(config, i), self.channel_mix(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.ln_out = nn.LayerNorm(C)
        self.head = linear(C, V)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `state` takes its place

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def initial_state(self, batch_size: int) -> tuple[LayerState, ...]:
        """The state before the first token: zeros, or the tuned states of the layers."""
        C, H, N = self.config.hidden_size, self.config.num_attention_heads, self.config.head_size
        shift = self.ln_out.weight.new_zeros(batch_size, C)
        dtype = torch.float64 if shift.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch_size, H, N, N, dtype=dtype, device=shift.device)
        tuned = [block.att.time_state for block in self.blocks]
        return tuple(LayerState(shift, shift, zeros if t is None else t.to(dtype).expand_as(zeros)) for t in tuned)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: tuple[LayerState, ...] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> RwkvPlainOutput | tuple:
        """input_ids [B,T] -> logits [B,T,V], and the state after the last token unless `use_cache` is False.

        Args:
            attention_mask: [B,T or longer]; its last T columns are of these tokens. 0: padding.
            state: of an earlier call; None for the beginning of a text.
            labels: [B,T], shifted here; -100 where nothing is to be learned.
            logits_to_keep: how many of the last positions get logits; 0 for all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        mask = _padding(attention_mask, x)
        x, states, v_first, hidden = self.blocks[0].ln0(x), [], None, []
        checkpointed = self.gradient_checkpointing and self.training
        for block, layer_state in zip(self.blocks, state or self.initial_state(x.shape[0]), strict=True):
            hidden.append(x)
            arguments = (x, layer_state, v_first, mask)
            if checkpointed:
                x, new, v_first = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                x, new, v_first = block(*arguments)
            states.append(new)
        x = self.ln_out(x)
        logits = self.head(x[:, -logits_to_keep:] if logits_to_keep else x)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        keep = getattr(self.config, "use_cache", True) and not self.training if use_cache is None else use_cache
        output = RwkvPlainOutput(
            loss=loss,
            logits=logits,
            state=tuple(states) if keep else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **others: Any) -> Any:
        """As transformers has it. Beams read their whole text at every step: not every version reorders `state`."""
        beams = others.get("num_beams") or getattr(generation_config or self.generation_config, "num_beams", 1)
        if (beams or 1) > 1:
            others["use_cache"] = False
        return super().generate(inputs, generation_config=generation_config, **others)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        is_first_iteration: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """With a state, only the last token is new; at the first step of a call all that was passed are."""
        first = state is None if is_first_iteration is None else is_first_iteration
        if inputs_embeds is not None and first:
            inputs = {"inputs_embeds": inputs_embeds}
        else:
            inputs = {"input_ids": input_ids if state is None or first else input_ids[:, -1:]}
        kept = {"attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        return inputs | {"state": state} | {name: value for name, value in kept.items() if value is not None}

    def _reorder_cache(self, state: Any, beam_idx: Tensor) -> Any:
        return state and tuple(LayerState(*(part[beam_idx] for part in layer)) for layer in state)

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *rest: Any, **others: Any) -> dict:
        model_kwargs["state"] = outputs.get("state")
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *rest, **others)


def _padding(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """[B,T,1] in x's dtype, 0 for padding; None where nothing is padded.

    Raises:
        ValueError: a mask that is not of these tokens.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != x.shape[0] or attention_mask.shape[1] < x.shape[1]:
        raise ValueError(f"attention_mask is {list(attention_mask.shape)}; tokens are {list(x.shape[:2])}.")
    mask = attention_mask[:, -x.shape[1] :].bool()
    return None if bool(mask.all()) else mask.unsqueeze(-1).to(x.dtype)
