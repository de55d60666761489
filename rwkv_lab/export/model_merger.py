"""Merges an adapter into its base, and proves it: RWKV by `rwkv_lab.merge`, models of Hugging Face shard by shard.

A model is loaded only where someone asks for it (`BaseModel.load`) and to compare logits; a merge reads files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from tempfile import gettempdir
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.errors import ModelMergeError, OutputError, RwkvLabError
from rwkv_lab.export.causal_lm.adapter import open_adapter
from rwkv_lab.export.causal_lm.folder import architecture, files_beside, open_folder
from rwkv_lab.export.causal_lm.loading import Quantisation, load_causal_lm, need
from rwkv_lab.export.causal_lm.merging import SHARD, plan_merge, write_merge
from rwkv_lab.export.causal_lm.verifying import verify_merge as verify_causal_lm
from rwkv_lab.merge import MergeResult, merge, verify_merge
from rwkv_lab.model import RWKV_Dual
from rwkv_lab.paths import to_path
from rwkv_lab.peft import quantise_blocks

Family = Literal["RWKV", "Hugging Face"]
_OURS = {"8bit": "int8", "4bit": "nf4"}  # what rwkv_lab.peft calls them


@dataclass(frozen=True)
class BaseModel:
    """A model that adapters are merged into; its files are known, and not loaded.

    quantisation: how `load` stores matrices: "none" (float32), "8bit" or "4bit". A merge reads the files either way.
    """

    path: Path
    family: Family
    quantisation: Quantisation = "none"

    def load(self) -> Any:
        """The model in torch, for inference on the CPU: an `RWKV_Dual`, or what transformers makes of it.

        Raises:
            ModelMergeError: it cannot be loaded.
        """
        try:
            if self.family == "Hugging Face":
                return load_causal_lm(self.path, self.quantisation)
            model = RWKV_Dual.from_pretrained(self.path, weights="dense")
            if self.quantisation != "none":
                quantise_blocks(model, _OURS[self.quantisation])
            return model
        except RwkvLabError as e:
            raise ModelMergeError(str(e)) from e


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter on the disk.

    base: what it states that it was trained on, "" where it states nothing.
    """

    path: Path
    family: Family
    base: str = ""


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that was found possible, from headers alone.

    changed: tensors that will not be the base's.
    """

    base: BaseModel
    adapter: LoraAdapter
    changed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    alpha: float | None = None


@dataclass(frozen=True)
class MergedModel:
    """What was written."""

    path: Path
    planned: PlannedMerge
    notes: tuple[str, ...] = ()
    result: MergeResult | None = None  # of RWKV
    checks: tuple[Check | NotApplicable, ...] = field(default=())  # made while writing


class ModelMerger:
    """Base, adapter, merge, file, proof: each a step of its own. Every error is a `ModelMergeError`, or an
    `OutputError` where nothing can be written."""

    @checked
    def load_base_model(self, path: str | Path, quantisation: Quantisation = "none") -> BaseModel:
        """Open a model: an RWKV checkpoint of any generation, or a folder of a causal language model of Hugging Face.

        Args:
            quantisation: how `BaseModel.load` stores matrices: "8bit" and "4bit" are bitsandbytes' for Hugging Face,
                int8 and NF4 of `rwkv_lab.peft` for RWKV.

        Raises:
            ModelMergeError: nothing is there, it is no model or a quantised one, or bitsandbytes is missing.
        """
        try:
            path = to_path(path, "base_model")
            family = _family(path)
            if family == "Hugging Face":
                with open_folder(path).ck:
                    pass
                if quantisation != "none":
                    need("bitsandbytes", f"quantisation={quantisation!r} of {path.name}")
        except RwkvLabError as e:
            raise ModelMergeError(str(e)) from e
        return BaseModel(path, family, quantisation)

    @checked
    def load_lora_adapter(self, path: str | Path) -> LoraAdapter:
        """Open an adapter: of peft, or of any kind that `rwkv_lab.merge` reads.

        Raises:
            ModelMergeError: nothing is there, it is no adapter, or of a kind that cannot be merged.
        """
        try:
            path = to_path(path, "adapter")
            with open_checkpoint(path) as ck:
                if any(name.startswith("blocks.") for name in ck.info):
                    return LoraAdapter(path, "RWKV")
            with (adapter := open_adapter(path)).ck:
                return LoraAdapter(path, "Hugging Face", adapter.base)
        except RwkvLabError as e:
            raise ModelMergeError(str(e)) from e

    @checked
    def merge_lora_weights(
        self, base: BaseModel, adapter: LoraAdapter, alpha: Annotated[float, Gt(0)] | None = None
    ) -> PlannedMerge:
        """Find what the merge changes, from headers alone; `save_merged_model` carries it out.

        Args:
            alpha: of a LoRA for RWKV whose file does not state it.

        Raises:
            ModelMergeError: the adapter is of another base.
        """
        if base.family != adapter.family:
            raise ModelMergeError(
                f"{adapter.path} is an adapter of a model of {adapter.family}; {base.path} is of {base.family}."
            )
        try:
            if base.family == "RWKV":
                nowhere = Path(gettempdir()) / f"{token_hex(6)}.safetensors"  # a dry run writes nothing
                plan = merge(base.path, adapter.path, nowhere, alpha=alpha, dry_run=True).plan
                changed, said = tuple(row.name for row in plan.rows if row.action != "copy"), list(plan.notes)
            else:
                with (b := open_folder(base.path)).ck, (a := open_adapter(adapter.path)).ck:
                    found = plan_merge(b, a)
                changed, said = tuple(found.changes), found.notes
        except RwkvLabError as e:
            raise ModelMergeError(str(e)) from e
        if base.quantisation != "none":
            said.append(
                f"the adapter is added to the weights in {base.path.name}, not to those in {base.quantisation}."
            )
        return PlannedMerge(base, adapter, changed, tuple(said), alpha)

    @checked
    def save_merged_model(
        self,
        planned: PlannedMerge,
        out: str | Path,
        tokenizer: str = "",
        overwrite: bool = False,
        max_shard_size: Annotated[int, Ge(1)] = SHARD,
    ) -> MergedModel:
        """Write the merged model, whole or not at all.

        Args:
            out: for RWKV a .pth or .safetensors; for Hugging Face a folder, with tokenizer, chat template and
                generation settings.
            tokenizer: for Hugging Face, a tokenizer.json or a folder with one; empty: the adapter's, else the base's.
            max_shard_size: for Hugging Face, bytes of a file of weights; a larger tensor has a file of its own.

        Raises:
            ModelMergeError: a file has changed or is damaged, there is no tokenizer, or a value does not fit its dtype.
            OutputError: `out` is there already, or cannot be written.
        """
        base, adapter = planned.base, planned.adapter
        path = to_path(out, "out")
        try:
            if base.family == "RWKV":
                result = merge(base.path, adapter.path, path, alpha=planned.alpha, overwrite=overwrite)
                return MergedModel(path, planned, tuple(result.notes), result, result.checks)
            beside = files_beside(base.path, adapter.path, tokenizer)
            with (b := open_folder(base.path)).ck, (a := open_adapter(adapter.path)).ck:
                plan = plan_merge(b, a)
                write_merge(plan, path, beside, overwrite, max_shard_size)
        except RwkvLabError as e:
            raise e if isinstance(e, OutputError) else ModelMergeError(str(e)) from e
        return MergedModel(path, planned, (*plan.notes, *planned.notes[len(plan.notes) :]))

    @checked
    def verify_merge_integrity(self, merged: MergedModel) -> list[Check | NotApplicable]:
        """Read what was written anew: untouched tensors by hash, changed ones by another computation, and for Hugging
        Face logits beside the base with the adapter, both run by peft.

        Raises:
            ModelMergeError: a file cannot be read.
        """
        try:
            if merged.result is not None:
                return [*merged.checks, *verify_merge(merged.result)]
            return verify_causal_lm(merged.planned.base.path, merged.planned.adapter.path, merged.path)
        except RwkvLabError as e:
            raise e if isinstance(e, ModelMergeError) else ModelMergeError(str(e)) from e


def _family(path: Path) -> Family:
    with open_checkpoint(path) as ck:
        if ck.layout is not None:
            return "RWKV"
        if architecture(ck.config) is not None:
            return "Hugging Face"
        raise ModelMergeError(f"{path} is no model that adapters are merged into here: {ck.reason or ck.kind}.")
