"""What is measured on a model: our own engines in every dtype, peers, and how one sample of each is taken."""

import itertools
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rwkv_lab.bench.comparison import OURS
from rwkv_lab.bench.peers import Peer, PeerError, Session, open_peer
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import RwkvLabError
from rwkv_lab.machine import memory_free
from rwkv_lab.model import RWKV_Dual, RWKVMode, RWKVState
from rwkv_lab.wkv import use_backend

log = logging.getLogger(__name__)

QUANTISED = ("int8", "int4")

READ, STEPS = 64, 64  # tokens of the comparison of answers: read at once, then one by one
BATCH_STEPS = 4  # of every sequence of a batch
_FEW = 8  # steps from which it follows how many a peer does in that time


@dataclass(frozen=True)
class Engine:
    """An entry with its model loaded: one of ours, or a peer's process."""

    name: str
    dtype: str
    model: RWKV_Dual | None = None
    session: Session | None = None

    @property
    def key(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def own_model(self) -> RWKV_Dual:
        """The model of an engine of ours."""
        assert self.model is not None, f"{self.key} is a peer"
        return self.model


def open_engines(
    path: Path, dtypes: Sequence[str], device: str, peers: Sequence[Peer], stack: ExitStack
) -> Iterator[tuple[Engine, str]]:
    """Every engine on this checkpoint, and why it does not run, "" where it does. Peers' processes end with `stack`."""
    for dtype in dtypes:
        try:
            yield Engine(OURS, dtype, model=load_model(path, dtype, device)), ""
        except RwkvLabError as e:
            yield Engine(OURS, dtype), str(e).splitlines()[0]
    for peer in peers:
        for dtype in dtypes:
            if peer.runs(dtype):
                try:
                    yield Engine(peer.name, dtype, session=stack.enter_context(open_peer(peer, path, dtype))), ""
                except PeerError as e:
                    yield Engine(peer.name, dtype), str(e)


def load_model(path: Path, dtype: str, device: str = "cpu") -> RWKV_Dual:
    """A checkpoint in one of our dtypes, int8 and int4 (weights alone) included."""
    if dtype in QUANTISED:
        return RWKV_Dual.from_pretrained(path, torch.bfloat16, device, weights=dtype)  # type: ignore[arg-type]
    return RWKV_Dual.from_pretrained(path, to_dtype(dtype), device).requires_grad_(False)


def tokens_for(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """Token ids `[B,T]` drawn from the vocabulary, the same each time; short ones are the beginning of long ones."""
    g = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(vocab_size, (length,), generator=g) for _ in range(batch)])


@dataclass(frozen=True)
class Expected:
    """The reference's logits: the plain recurrence in float64, or in float32 where memory is short."""

    steps: torch.Tensor  # [1 + STEPS, V], after a prompt of READ tokens and after each of STEPS that follow
    prefilled: dict[int, torch.Tensor]  # length -> [1, V]
    batch: torch.Tensor  # [B, BATCH_STEPS, V]
    tokens: Callable[[int, int], torch.Tensor]  # (sequences, length) -> the token ids that all of this is about


@torch.no_grad()
def expected_answers(path: Path, lengths: Sequence[int], batch: int) -> Expected:
    """The logits of the reference implementation for the tokens that every engine gets."""
    with open_checkpoint(path) as ck:
        wide = 8 * sum(t.numel for t in ck.info.values()) < memory_free() / 3
    dtype = torch.float64 if wide else torch.float32
    log.info("%s: computing the expected logits, token by token in %s; this takes a while.", path.name, dtype)
    model = RWKV_Dual.from_pretrained(path, dtype)
    tokens = partial(tokens_for, model.layout.vocab_size)

    with use_backend("reference"):
        return Expected(
            model.parallel(tokens(1, READ + STEPS))[0][0, READ - 1 :],
            {length: model.prefill(tokens(1, length))[0] for length in lengths},
            model.parallel(tokens(batch, BATCH_STEPS))[0],
            tokens,
        )


def weight_bytes(model: RWKV_Dual) -> int:
    """Bytes of all weights, read once, less the embedding, of which one row per token is read."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return sum(t.nbytes for name, t in tensors if not name.startswith("emb."))


def flops_per_token(model: RWKV_Dual, head: bool = True) -> int:
    """Floating-point operations of one token: two per weight of every matrix, and those of the WKV operator.

    Args:
        head: with the logits; all but the last token of a prompt go without.
    """
    layout = model.layout
    without = ("emb.",) if head else ("emb.", "head.")
    matrices = sum(p.numel() for n, p in model.named_parameters() if _is_matrix(p) and not n.startswith(without))
    per_head = {"7.0": 10, "4.0": 0}.get(layout.version, 6) * layout.head_size**2
    return 2 * matrices + layout.n_layer * layout.n_head * per_head


def _is_matrix(p: torch.Tensor) -> bool:
    return p.ndim >= 2 and 1 not in p.shape[-2:]


def our_answers(model: RWKV_Dual, tokens: torch.Tensor) -> torch.Tensor:
    """As a peer's: logits `[1 + STEPS, V]` after a prompt and after each of the tokens that follow it."""
    tokens = tokens.to(model.get_device())
    logits, state = model.prefill(tokens[:, :READ])
    with as_rnn(model):
        rest = model(tokens[:, READ:], state=state)[0]
    return torch.cat([logits, rest[0]]).cpu()


def decoder(engine: Engine, tokens: torch.Tensor, duration: float = 0.5) -> Callable[[], float]:
    """A function that takes one sample: tokens per second, of all sequences together.

    Args:
        tokens: `[B,T]`, read before; a peer takes one sequence.
        duration: of a sample, in seconds, as it is now.
    """
    if session := engine.session:
        ids = tokens[0].tolist()
        few = session.seconds("decode", ids[: 1 + _FEW], 1) / _FEW
        steps = max(_FEW, min(round(duration / few), len(ids) - 1))
        return lambda: steps / session.seconds("decode", ids[: 1 + steps], 1)
    model, batch = engine.own_model, len(tokens)
    tokens = tokens.to(model.get_device())
    state = model.prefill(tokens)[1]
    # Two steps take long the first time: what is compiled on first use is compiled then.
    steps, seconds = 1, 0.0
    while seconds < duration / 4:
        steps *= 2
        seconds = _decode(model, tokens[:, :1], state, steps)
        if steps == 2:
            seconds = 0.0
    steps = max(2, round(steps * duration / seconds))
    return lambda: batch * steps / _decode(model, tokens[:, :1], state, steps)


def _decode(model: RWKV_Dual, tokens: torch.Tensor, state: RWKVState, steps: int) -> float:
    """Seconds of that many calls with one token per sequence, `[B,1]`."""

    def run() -> None:
        now = state
        for _ in range(steps):
            _, now = model(tokens, state=now)

    with as_rnn(model):
        return seconds_of(run, model)


def seconds_of(work: Callable[[], object], model: RWKV_Dual) -> float:
    """How long some work with a model takes, without gradients; on a GPU until it is done there."""
    on_gpu = model.get_device().type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def as_rnn(model: RWKV_Dual) -> Iterator[None]:
    """The model in RNN mode inside the block."""
    before = model.mode
    model.set_mode(RWKVMode.RNN)
    try:
        yield
    finally:
        model.set_mode(before)


@contextmanager
def busy_loop() -> Iterator[None]:
    """A process that keeps one core busy while the block runs, and ends when this process is killed."""
    code = "import os\nparent = os.getppid()\nprint(flush=True)\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None  # for it is a pipe
    try:
        process.stdout.readline()  # it is running
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
