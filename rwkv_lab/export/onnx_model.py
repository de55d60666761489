"""Exported models run by onnxruntime and NumPy alone: text goes in, text comes out. torch is not imported."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from rwkv_lab.arguments import checked, whole_numbers
from rwkv_lab.errors import CorruptFileError, NumericsError, ParameterError
from rwkv_lab.export.causal_lm.chat_template import render_chat
from rwkv_lab.export.onnx_folder import CAUSAL_LM, MANIFEST
from rwkv_lab.export.onnx_graphs import CachedGraph, Graphs, RecurrentGraphs, State
from rwkv_lab.tokenizer import Tokenizer, load_tokenizer
from rwkv_lab.tokenizer.stopping import StopText, stop_texts

_PIECE = 256  # tokens of a prompt that are read at once: their logits are [B,T,V]


class OnnxModel:
    """An exported model. It keeps nothing between two calls: a state goes in, and the next one comes out.

    Args:
        folder: what `export_onnx` or `run` wrote.
        providers: of onnxruntime, the first that can is taken; None for the CPU. `onnxruntime.get_available_providers`
            names those that are there.
        threads: of onnxruntime within an operator; None for as many as there are cores.
        low_memory: leave weights in their file, which the system reads into memory and drops again as it needs; each
            call then casts those of fp16, and those of int8 are multiplied at half the speed. Those of int4 are copied
            anyway, but for one graph at a time: the other is opened where a call needs it.

    Attributes:
        layout: generation or type, and dimensions: n_layer, n_embd, vocab_size, …
        weights: how they are stored: fp32, fp16, int8, int4.

    Raises:
        ParameterError: no such folder or provider, or onnxruntime is missing.
        CorruptFileError: a file of the folder is missing, has another size, or cannot be opened.
        UnsafeFileError: a graph wants its weights from outside the folder, or through a link.
    """

    @checked
    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] | None = None,
        threads: Annotated[int, Ge(1), Le(1024)] | None = None,
        low_memory: bool = False,
    ):
        self.folder = Path(folder)
        manifest = _manifest(self.folder)
        self.layout: dict[str, Any] = manifest["layout"]
        self.weights: str = manifest["weights"]
        self._tokenizer_name, self._tokenizer = manifest["tokenizer"], None
        self._manifest = manifest
        of = CachedGraph if manifest.get("format") == CAUSAL_LM else RecurrentGraphs
        try:
            self._graphs: Graphs = of(self.folder, manifest, providers, threads, low_memory)
        except (KeyError, TypeError, ValueError) as e:
            raise CorruptFileError(f"{self.folder / MANIFEST} does not describe an exported model: {e!r}.") from e

    @property
    def vocab_size(self) -> int:
        """How many tokens the model knows."""
        return self._graphs.vocab_size

    @property
    def context(self) -> int | None:
        """How many tokens a text may have; None for any number."""
        return self._graphs.context

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back.

        Raises:
            ParameterError: the folder has none.
        """
        if self._tokenizer is None:
            if self._tokenizer_name is None:
                raise ParameterError(
                    f"{self.folder} has no tokenizer; prompt it with token ids, or export it with tokenizer=…."
                )
            which = self._tokenizer_name
            own = self.context is None
            found = load_tokenizer(which if which == "bytes" else self.folder / which, self.vocab_size if own else None)
            found.vocab_size = max(found.vocab_size, self.vocab_size)  # of others, embeddings have rows to spare
            self._tokenizer = found
        return self._tokenizer

    @checked
    def create_state(self, batch_size: Annotated[int, Ge(1), Le(2**31)] = 1) -> State:
        """The state before the first token, tuned where the model's was."""
        return self._graphs.create_state(batch_size)

    @checked
    def run(self, tokens: Any, state: dict | None = None, attention_mask: Any = None) -> tuple[np.ndarray, State]:
        """Run tokens `[B,T]` from a state, None for `create_state`.

        Args:
            attention_mask: of models with attention: 0 where a row is padded, in front, and 1 elsewhere, `[B,T]`; None
                for rows without padding.

        Returns:
            logits float32 `[B,T,V]`, or `[B,V]` of the last token where T = 1 or the model was exported with
            logits="last"; and the state after the last token.

        Raises:
            ParameterError: tokens of a wrong shape, dtype or value; a state of another model or batch; a text that is
                longer than the model's context.
        """
        ids = self._checked_tokens(tokens)
        return self._graphs.run(ids, self.create_state(len(ids)) if state is None else state, attention_mask)

    @checked
    def chat_prompt(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
        """A conversation as the prompt that its model was trained on, by the chat template saved with it.

        Args:
            messages: each with "role" and "content", as in [{"role": "user", "content": "Hello"}].
            add_generation_prompt: end with what begins an answer.

        Raises:
            ParameterError: the folder has no template, jinja2 is missing, or the template refuses the messages.
        """
        name = self._manifest.get("chat_template")
        if name is None:
            raise ParameterError(f"{self.folder} has no chat template; write the prompt as the model knows it.")
        special = self._manifest["special_tokens"]
        return render_chat(self.folder / name, messages, add_generation_prompt, special)

    @checked
    def generate(
        self,
        prompt: str | Iterable[int],
        max_new_tokens: Annotated[int, Ge(0)] = 100,
        temperature: Annotated[float, Ge(0)] = 1.0,
        top_p: Annotated[float, Gt(0), Le(1)] = 0.9,
        seed: int | None = 0,
        stop: str | Iterable[str] | None = (),
        stop_tokens: Iterable[int] = (),
        streaming_callback: Callable[[int, str], object] | None = None,
    ) -> str:
        """Continue a prompt and return the new text.

        Args:
            streaming_callback: called with every new token and the text that it completes. Where it returns False, the
                text ends there.
            For the others, and errors, see `stream`.
        """
        text = []
        self.tokenizer  # noqa: B018  raises where there is none
        for token, piece in self.stream(prompt, max_new_tokens, temperature, top_p, seed, stop, stop_tokens):
            text.append(piece)
            if streaming_callback is not None and streaming_callback(token, piece) is False:
                break
        return "".join(text)

    @checked
    def stream(
        self,
        prompt: str | Iterable[int],
        max_new_tokens: Annotated[int, Ge(0)] = 100,
        temperature: Annotated[float, Ge(0)] = 1.0,
        top_p: Annotated[float, Gt(0), Le(1)] = 0.9,
        seed: int | None = 0,
        stop: str | Iterable[str] | None = (),
        stop_tokens: Iterable[int] = (),
    ) -> Iterator[tuple[int, str]]:
        """Continue a prompt, token by token: yields (token, text that it completes).

        Args:
            prompt: a text or token ids. Empty, it begins a text. Without a tokenizer it is ids, and all text is "".
            max_new_tokens: tokens at most.
            temperature: 0 always takes the likeliest token.
            top_p: draw from the smallest set of tokens that holds this much probability.
            seed: the same seed gives the same text; None for another one each time.
            stop: a text or texts that end the text; they are not part of it.
            stop_tokens: tokens that end the text, as the end of text always does; they are not part of it.

        Raises:
            ParameterError: no tokenizer, a token outside the vocabulary, nothing to begin with.
            NumericsError: NaN or infinity in the logits, while it runs.
        """
        if self._tokenizer_name is None and isinstance(prompt, str):
            self.tokenizer  # noqa: B018  says that there is none
        ids, ends = self._prompt(prompt), set(whole_numbers(stop_tokens, "stop_tokens"))
        ends.update(self._manifest.get("end_tokens", ()))
        if self.context is not None and len(ids) + max_new_tokens > self.context:
            left = max(self.context - len(ids), 0)
            raise ParameterError(
                f"The prompt has {len(ids)} tokens; with {max_new_tokens} new ones it is longer than the model's "
                f"context of {self.context}.\nPass max_new_tokens={left}, or a shorter prompt."
            )
        text = _Text(self.tokenizer if self._tokenizer_name else None, StopText(stop_texts(stop)), ends)
        return self._stream(ids, max_new_tokens, temperature, top_p, np.random.default_rng(seed), text)

    def _stream(self, ids, max_new_tokens, temperature, top_p, draw, text: "_Text") -> Iterator[tuple[int, str]]:
        logits, state = self._read(ids)
        for number in range(max_new_tokens):
            token = _sample(logits, temperature, top_p, draw)
            piece = text.feed(token)
            if text.over or number == max_new_tokens - 1:
                yield token, piece + text.close()
                return
            yield token, piece
            logits, state = self._read([token], state)

    def _read(self, ids: Sequence[int], state: State | None = None) -> tuple[np.ndarray, State]:
        """Logits `[V]` after the last of these tokens, and the state."""
        logits = np.zeros(0)
        for start in range(0, len(ids), _PIECE):
            logits, state = self.run([ids[start : start + _PIECE]], state)
        assert state is not None
        return (logits[0, -1] if logits.ndim == 3 else logits[0]), state

    def _prompt(self, prompt: str | Iterable[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else whole_numbers(prompt, "prompt")
        begin = self._manifest.get("begin_tokens", [])
        if isinstance(prompt, str) and ids[: len(begin)] != begin:  # a chat's prompt has them already
            ids = begin + ids
        end = self.tokenizer.end_of_text if self._tokenizer_name else None
        if not ids and end is None:
            raise ParameterError("The prompt is empty, and this vocabulary has no token to begin a text with.")
        return ids or [int(end or 0)]

    def _checked_tokens(self, tokens: Any) -> np.ndarray:
        try:
            ids = np.asarray(tokens)
        except (TypeError, ValueError) as e:
            raise ParameterError(f"tokens must be integers of shape [B,T]; pad rows of unequal length ({e}).") from e
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
            raise ParameterError(
                f"tokens must be integers of shape [B,T] with B, T >= 1; given {ids.dtype} {list(ids.shape)}."
            )
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ParameterError(f"Token {wrong} is outside the vocabulary: 0 to {self.vocab_size - 1}.")
        return ids.astype(np.int64)


class _Text:
    """From tokens to text, up to a token or a text that ends it."""

    def __init__(self, tokenizer: Tokenizer | None, stops: StopText, ends: set[int]):
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._stops, self._ends, self.over = stops, ends, False
        if tokenizer is not None and tokenizer.end_of_text is not None:
            ends.add(tokenizer.end_of_text)

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self.over = token in self._ends
        if self.over or self._stream is None:
            return ""
        piece = self._stops.feed(self._stream.feed(token))
        self.over = self._stops.found is not None
        return piece

    def close(self) -> str:
        """What was held back: none of it, where a stop was found."""
        if self._stream is None or self._stops.found is not None:
            return ""
        return self._stops.feed(self._stream.close()) + self._stops.close()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ParameterError(f"{folder} has no {MANIFEST}: it is no folder that export_onnx wrote.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        manifest["layout"]["vocab_size"], manifest["weights"], manifest["tokenizer"]
        sizes = {name: int(facts["bytes"]) for name, facts in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CorruptFileError(f"{path} does not describe an exported model: {e}.") from e
    for name, size in sizes.items():
        file = folder / Path(name).name
        if not file.is_file() or name != file.name:
            raise CorruptFileError(f"{folder} has no {name}, which {MANIFEST} names.")
        if file.stat().st_size != size and name != "README.md":
            raise CorruptFileError(f"{file} has {file.stat().st_size} bytes; {MANIFEST} says {size}. Export it again.")
    return manifest


def _sample(logits: np.ndarray, temperature: float, top_p: float, draw: np.random.Generator) -> int:
    """Draw a token from logits `[V]`."""
    if not np.isfinite(logits).all():
        raise NumericsError("The model's logits hold NaN or infinity: its weights are at fault.")
    if temperature == 0:
        return int(logits.argmax())
    tokens = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[tokens].astype(np.float64) - float(logits[tokens[0]])) / temperature)
    weights /= weights.sum()
    before = np.concatenate([[0], np.cumsum(weights)[:-1]])
    weights[before >= top_p] = 0  # keeps at least the likeliest
    return int(draw.choice(tokens, p=weights / weights.sum()))
