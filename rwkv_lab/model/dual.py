"""RWKV_Dual: one set of weights, run as a transformer (whole sequences) or as an RNN (token by token)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from rwkv_lab.arguments import Size, check, checked
from rwkv_lab.checkpoint import Checkpoint, Layout
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import DeviceError, ParameterError
from rwkv_lab.model import rwkv7
from rwkv_lab.model.block import GROUP_NORM_EPS
from rwkv_lab.model.blocks import run_blocks
from rwkv_lab.model.cpu import prefill, step
from rwkv_lab.model.cpu.eligibility import eligible
from rwkv_lab.model.device import device_errors, falls_back, parse_device, warn_of_fallback
from rwkv_lab.model.generation import check_callback, generate_stream, read_to_end
from rwkv_lab.model.initial_state import add_time_state, initial_state, take_time_state
from rwkv_lab.model.inputs import check_tokens
from rwkv_lab.model.loading import check_tensors, fill, open_model
from rwkv_lab.model.mode import RWKVMode, to_mode
from rwkv_lab.model.packed_file import Weights, refuse_packed_twice, take_activations, take_packed
from rwkv_lab.model.prompts import Prompt
from rwkv_lab.model.protocol import Model, Tokens
from rwkv_lab.model.ragged import read_ragged
from rwkv_lab.model.registry import generation_of
from rwkv_lab.model.sampling import Convention, Seed
from rwkv_lab.model.saving import Loaded, loaded_from, save
from rwkv_lab.model.standard_modules import standard
from rwkv_lab.model.state import RWKVState, check_state
from rwkv_lab.model.state_cache import StateCache
from rwkv_lab.model.weight_only import SCHEMES
from rwkv_lab.tokenizer import Tokenizer, load_tokenizer, tokenizer_for


@standard
class RWKV_Dual(nn.Module):
    """An RWKV language model. Its `state_dict` has exactly the names and shapes of BlinkDL's checkpoints.

    The constructor makes a fresh RWKV-7 in float32, drawn from torch's generator; `from_pretrained` reads a model of
    any generation. Autocast may be on: the WKV operators stay in float32.

    Args:
        n_embd: channels C, a multiple of head_size.
        n_layer: number of blocks L.
        vocab_size: V. 65536 (World), 256 and 257 (bytes) tell the tokenizer; for others see `tokenizer`.
        ctx_len: tokens run at once when a prompt is read; no limit on how long a sequence may be.
        mode: how `model(tokens)` runs.
        head_size: N.

    Attributes:
        layout: generation and dimensions.
        gradient_checkpointing: set it to True to keep only each layer's input for the backward pass and run the layer
            again there: less memory, about a third more time. Off at first.
        fallback: device to move to when the present one fails, None to raise; an argument of `from_pretrained`.

    Raises:
        ParameterError: sizes that do not go together.
    """

    @checked
    def __init__(
        self,
        n_embd: Annotated[int, Ge(1), Le(2**20)],
        n_layer: Annotated[int, Ge(1), Le(9999)],
        vocab_size: Annotated[int, Ge(2), Le(2**24)],
        ctx_len: Annotated[int, Ge(1)] = 1024,
        mode: RWKVMode | str = RWKVMode.TRANSFORMER,
        head_size: Annotated[int, Ge(1), Le(2**20)] = 64,
    ):
        layout = rwkv7.fresh_layout(n_embd, n_layer, vocab_size, head_size)
        self._build(layout, ctx_len, mode, GROUP_NORM_EPS, names=())
        self.float()  # whatever dtype is torch's default
        self.to_empty(device="cpu")
        rwkv7.initialise(self)

    def _build(self, layout, ctx_len, mode, group_norm_eps, names) -> None:
        """Modules of the right sizes without memory behind them, which comes with `to_empty`.

        `names` are those of the file's tensors: some generations have tensors that only some files hold.
        """
        super().__init__()
        self.layout, self.ctx_len, self._tokenizer = layout, ctx_len, None
        self.gradient_checkpointing, self.fallback = False, None
        self._loaded: Loaded | None = None
        self.set_mode(mode)
        with torch.device("meta"):
            # Random values of nn.Embedding, even of the device "meta", make torch import its compiler: 1 to 2 seconds.
            self.emb = nn.Embedding.from_pretrained(torch.empty(layout.vocab_size, layout.n_embd), freeze=False)
            self.blocks = nn.ModuleList(
                generation_of(layout).make_block(layout, layer, group_norm_eps, names)
                for layer in range(layout.n_layer)
            )
            self.ln_out = nn.LayerNorm(layout.n_embd)
            self.head = nn.Linear(layout.n_embd, layout.vocab_size, bias=False)

    @classmethod
    @checked
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: str | torch.device | int = "cpu",
        mode: RWKVMode | str = RWKVMode.TRANSFORMER,
        group_norm_eps: Annotated[float, Gt(0)] | None = None,
        fallback: str | torch.device | int | None = None,
        weights: Weights = "stored",
    ) -> "RWKV_Dual":
        """Load a checkpoint of RWKV-4, 5.0, 5.1, 5.2, 6 or 7; generation and dimensions come from its tensors.

        Tensors are read and converted in blocks, straight to where they stay: nothing is in memory twice. Matrices in 8
        or 4 bits stay so, mapped from the file, which must not be shortened meanwhile.

        Args:
            path: `.pth`, `.safetensors`, or a folder that `save_pretrained` wrote. Any dtype inside.
            dtype: of the parameters, torch's own or by name: float64, float32, bfloat16, float16 (or fp64, bf16, …).
                The WKV state and `time_state` are float32 in any case (float64 for float64).
                In float16, models of RWKV-4 to 6 halve their residual stream every six layers (see `Block`).
            group_norm_eps: of `att.ln_x` in RWKV-5 to 7; None for what a folder's config.json states, else 64e-5. No
                .pth records it, implementations differ.
            fallback: device to go on with, after a warning, when `device` fails: now or in a later call of the model,
                which is then moved there. None raises DeviceError.
            weights: "stored": as the file has them, in 8 or 4 bits where `save_pretrained` or an export wrote them so;
                "dense": all in `dtype`; "int8", "int4" or "nf4": packed as by `quantise_weights`, while they are read.

        Raises:
            LayoutError: not a whole model of a generation that runs here, or tensors that do not fit.
            CorruptFileError, UnsafeFileError: see `open_checkpoint`.
            DeviceError: the device is not there, failed, or has too little memory.
            NumericsError: a value that float16 cannot hold.
            ParameterError: no such device or mode, or a dtype that is no floating one; a file to be packed that is so.
        """
        dtype, device = to_dtype(dtype), parse_device(device)
        with open_model(path) as (ck, layout):
            model, tensors = outline(ck, layout, mode, group_norm_eps, dtype, cls), dict(ck.info)
            model.fallback = None if fallback is None else parse_device(fallback)
            refuse_packed_twice(tensors, weights, path)
            check_tensors(model, tensors, path)
            try:
                model._load(tensors, path, device, weights, dtype)
            except DeviceError as e:
                if model.fallback is None:
                    raise
                warn_of_fallback(e, model.fallback)
                model._load(tensors, path, model.fallback, weights, dtype)
            take_activations(model, ck.metadata)
            model._loaded = loaded_from(model, ck, is_changed=weights in SCHEMES)
        return model

    def _load(self, tensors, path, device: torch.device, weights: Weights, dtype: torch.dtype) -> None:
        with device_errors(device):
            fill(self, take_packed(self, tensors, device, weights, dtype), path)

    @checked
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `<folder>/model.safetensors` (the folder is made if need be) and return its path. What the model's own
        file says of its origin, and of adapters that it contains, stands there too.

        Raises:
            OutputError: the file is there already, or cannot be written.
            ParameterError: the model holds adapters, which a checkpoint does not.
        """
        return save(self, folder, self._loaded)

    # ------------------------------------------------------------------ running

    @falls_back
    def forward(
        self, tokens: Tokens, state: RWKVState | None = None, return_v_first: bool = False
    ) -> tuple[torch.Tensor, Any]:
        """Run tokens `[B,T]` (integers, T >= 1) in the model's mode.

        Args:
            state: what came before; None for `create_state`. Never changed in place.
            return_v_first: give layer 0's values instead of the state; RWKV-7 only.

        Returns:
            logits `[B,T,V]`, and the state after the last token, or v_first `[B,T,A]` (A = C in released models).

        Raises:
            ParameterError: tokens of a wrong shape, dtype or value; a state of another model, batch, dtype or device.
            DeviceError: the device failed, and there is no fallback.
        """
        if return_v_first and not generation_of(self.layout).has_v_first:
            raise ParameterError(f"return_v_first: RWKV-{self.layout.version} has no v_first, only RWKV-7 has.")
        ids = check_tokens(self, tokens)
        if self.mode is RWKVMode.TRANSFORMER:
            pieces = [ids]
        elif not return_v_first and (found := eligible(self, "step", ids, state)):
            return step.run(self, found, ids, state)
        else:
            pieces = ids.split(1, dim=1)
        logits, v_first = [], []
        for piece in pieces:
            x, state, v = self._run(piece, state, return_v_first)
            logits.append(self._logits(x))
            v_first.append(v)
        logits = torch.cat(logits, dim=1)
        return logits, torch.cat(v_first, dim=1) if return_v_first else state

    @falls_back
    def parallel(self, tokens: Tokens, state: RWKVState | None = None) -> tuple[torch.Tensor, RWKVState]:
        """As calling the model in TRANSFORMER mode, whatever its mode is: logits `[B,T,V]` and the final state."""
        x, state, _ = self._run(check_tokens(self, tokens), state)
        return self._logits(x), state

    @falls_back
    def prefill(
        self, tokens: Tokens, state: RWKVState | None = None, lengths: Iterable[int] | None = None
    ) -> tuple[torch.Tensor, RWKVState]:
        """Read tokens `[B,T]` in parallel, `ctx_len` at a time: logits after the last one `[B,V]`, and the state.

        Next to feed is the token that those logits choose; the last one of `tokens` has been read already.

        Args:
            lengths: B integers from 1 to T where rows are padded on the right: how many tokens of each row count.
                Logits and state are those after each row's own last token. No padding is read: rows that have ended
                drop out, so every length that occurs costs one pass more.

        Raises:
            ParameterError, DeviceError: as calling the model; lengths that do not fit.
        """
        ids = check_tokens(self, tokens)
        if ids.shape[1] == 1 and (found := eligible(self, "step", ids, state)):
            logits, after = step.run(self, found, ids, state)
            return logits[:, 0], after
        if lengths is None:
            x, after = self._read(ids, state)
        else:
            x, after = read_ragged(self._read, ids, state, lengths)
        return self._logits(x), after

    def _read(self, tokens: torch.Tensor, state: Any) -> tuple[torch.Tensor, RWKVState]:
        """tokens `[B,T]` -> x of the last one `[B,C]` before ln_out, the new state."""
        for piece in tokens.split(self.ctx_len, dim=1):
            x, state, _ = self._run(piece, state)
        return x[:, -1], state

    def _run(self, tokens, state, return_v_first=False):
        """tokens `[B,T]` -> x `[B,T,C]` before ln_out, the new state, v_first `[B,T,A]` where it is asked for."""
        if state is None:
            state = self.create_state(len(tokens))
        else:
            check_state(state, self, len(tokens))
        permit = eligible(self, "prefill", tokens, state)
        if permit and not return_v_first:
            return *prefill.run(self, permit, tokens, state), None
        return run_blocks(self, tokens, state)

    def _logits(self, x):
        """x `[...,C]` before ln_out -> logits `[...,V]`."""
        if not x.requires_grad and (permit := eligible(self, "prefill")):
            return prefill.logits(self, permit, x)
        return self.head(self.ln_out(x))

    # ------------------------------------------------------------------ states

    @checked
    def create_state(self, batch_size: Size = 1, tuned: str | Path | None = None) -> RWKVState:
        """The state before the first token: `time_state` where the model has one, else zeros.

        Gradients reach `time_state` through it.

        Args:
            tuned: a state file whose `time_state` is taken instead; the model stays as it is.

        Raises:
            LayoutError, NumericsError: see `load_state_file`.
        """
        return initial_state(self, tuned).expand(batch_size)

    @property
    def has_time_state(self) -> bool:
        """Whether the model carries tuned initial states (`blocks.i.att.time_state`)."""
        return getattr(self.blocks[0].att, "time_state", None) is not None

    @property
    def state_dtype(self) -> torch.dtype:
        """Of `RWKVState.wkv` and of `time_state`."""
        return torch.float64 if self.emb.weight.dtype == torch.float64 else torch.float32

    def add_time_state(self) -> None:
        """Give every layer an initial state `[H,V,K]`, zeros to begin with; leaves those that are there.

        Raises:
            ParameterError: RWKV-4, whose states are no matrices.
        """
        add_time_state(self)

    @checked
    def load_state_file(self, path: str | Path) -> None:
        """Take the tuned initial states of a state file (or of a whole model that has them) as this model's own.

        Raises:
            LayoutError: none there, or of a model of other dimensions.
            NumericsError: NaN or infinity inside.
            ParameterError: this model is RWKV-4, which has no such states.
        """
        take_time_state(self, path)

    # ------------------------------------------------------------------ the rest

    def set_mode(self, mode: RWKVMode | str) -> None:
        """Choose how `model(tokens)` runs.

        Raises:
            ParameterError: no such mode.
        """
        self.mode = to_mode(mode)

    def get_device(self) -> torch.device:
        return self.emb.weight.device

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back; chosen by vocabulary size, or named: `model.tokenizer = "world"`, "bytes", a path.

        Raises:
            ParameterError: the size of the vocabulary does not tell, or the tokenizer named does not fit.
        """
        if self._tokenizer is None:
            self._tokenizer = tokenizer_for(self.layout.vocab_size)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, which: str | Path) -> None:
        self._tokenizer = load_tokenizer(which, self.layout.vocab_size)

    @checked
    def batch_decode(self, list_of_ids: Iterable[Iterable[int]]) -> list[str]:
        """The text of each list of token ids."""
        return [self.tokenizer.decode(ids) for ids in list_of_ids]

    @checked
    def generate_with_streaming(
        self,
        prompt: Prompt,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 0.9,
        seed: Seed = 0,
        state: RWKVState | None = None,
        streaming_callback: Callable[[int, str], object] | None = None,
        top_k: int = 0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        stop_tokens: Iterable[int] | int = (),
        cache: StateCache | None = None,
        *,
        stop: str | Iterable[str] | None = (),
        penalty_decay: float = 1.0,
        exempt_tokens: Iterable[int] = (),
        sampling: Convention = "standard",
        logits: torch.Tensor | None = None,
    ) -> str:
        """Continue a prompt and return the new text; `generate` continues several at once.

        All arguments but the callback as in `generate_stream`, which gives more: ids, state, why it ended.

        Args:
            prompt: a text or token ids.
            streaming_callback: called with every new token and the text that it completes, which is "" inside a
                character, for a token that ends the text, and while it may be the beginning of a stop. Where it returns
                False, the text ends there.

        Raises:
            ParameterError: values out of range, no tokenizer for this vocabulary, a state that does not fit, or nothing
                to read after a state.
            NumericsError: NaN or infinity in the logits.
        """
        check_callback(streaming_callback)
        stream = generate_stream(
            self,
            prompt,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            state,
            top_k,
            presence_penalty,
            frequency_penalty,
            stop_tokens,
            cache,
            stop=stop,
            penalty_decay=penalty_decay,
            exempt_tokens=exempt_tokens,
            sampling=sampling,
            logits=logits,
        )
        return read_to_end(stream, streaming_callback)


@torch.no_grad()
def init_state_with_past(model: RWKV_Dual, tokens: Tokens, lengths: Iterable[int] | None = None) -> RWKVState:
    """The state after tokens `[B,T]`, left by one parallel pass: continue with the token that follows them.

    `lengths` as in `RWKV_Dual.prefill`, for rows that are padded on the right.
    """
    check("init_state_with_past", "model", model, Model)
    return model.prefill(tokens, lengths=lengths)[1]


def outline(
    ck: Checkpoint,
    layout: Layout,
    mode: RWKVMode | str = RWKVMode.TRANSFORMER,
    group_norm_eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    kind: type[RWKV_Dual] = RWKV_Dual,
) -> RWKV_Dual:
    """The model of an open checkpoint without values, on the device "meta": names and shapes from the header."""
    model, tensors = kind.__new__(kind), dict(ck.info)
    eps = next((e for e in (group_norm_eps, ck.group_norm_eps) if e is not None), GROUP_NORM_EPS)
    model._build(layout, 1024, mode, eps, tensors)
    model.to(dtype)
    if any(name.endswith(".time_state") for name in tensors):
        model.add_time_state()
    return model
