"""The translation artifact: a learned plan on disk, and its application to a model's weights.

A translation is a sealed directory with:

- one `plan-*.safetensors` per rank that wrote it: its rows of P as CSR, with their source token
  ids and marginals;
- `target_marginal.safetensors`;
- `translation.json`.

P has total mass 1. Source tokens that the stage did not use have no row. If E and L have separate
plans, both are stored, with the same rows and marginals.

Shapes: R source tokens in use, V the source vocabulary, U the target vocabulary, D model width.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm, agree
from s2t2_dist.data.shards import tokenizer_sha256
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error
from s2t2_dist.lm.fold import fold
from s2t2_dist.lm.result import special_ids
from s2t2_dist.ot import weight_factors

FORMAT_VERSION = 2
PLANS = (["plan"], ["embed", "head"])  # plan names: one shared plan, or separate plans
CSR = ("indptr", "indices", "values")
TRANSLATION_DIR = "translation"
RECORD = "translation.json"
TARGET_MARGINAL = "target_marginal.safetensors"


@dataclass(frozen=True, eq=False)
class Translation:
    """One shared plan between two vocabularies, or separate plans for embedding and LM head.

    Attributes:
        plans: by name, "plan" or "embed" and "head"; each (R, U) sparse COO float32, coalesced,
            total mass 1.
        source_token_ids: (R,) the source token id of each row.
        source_marginal, target_marginal: (R,) and (U,), float64.
        embed_scale: "paper" or "convex": the scaling of E'.
        vocab_size: V, rows of the source model's embedding.
        info: provenance: method, iterations, base model, statistics.
    """

    plans: dict[str, torch.Tensor]
    source_token_ids: torch.Tensor
    source_marginal: torch.Tensor
    target_marginal: torch.Tensor
    source_tokenizer_sha256: str
    target_tokenizer_sha256: str
    embed_scale: str
    vocab_size: int
    info: dict[str, Any]

    @property
    def embed_plan(self) -> torch.Tensor:
        """The P for E'."""
        return next(iter(self.plans.values()))

    @property
    def head_plan(self) -> torch.Tensor:
        """The P for L'; equal to `embed_plan` if the plan is shared."""
        return list(self.plans.values())[-1]

    def embed(self, embed_VD: torch.Tensor) -> torch.Tensor:
        """E' (U, D) float32 of any model with the source vocabulary."""
        return self._translated("embed", self.embed_plan, self._rows(embed_VD, "embedding"))

    def head(self, head_VD: torch.Tensor) -> torch.Tensor:
        """L' (U, D) float32: convex combinations of the rows of L."""
        return self._translated("head", self.head_plan, self._rows(head_VD, "LM head"))

    def _translated(self, weight: str, plan: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """E' or L'; the rows, a copy, are used up."""
        marginals = self.source_marginal, self.target_marginal
        before, after = weight_factors(weight, self.embed_scale, *marginals)
        return torch.sparse.mm(plan.T, rows.mul_(before)).mul_(after)

    def _rows(self, weight_VD: torch.Tensor, name: str) -> torch.Tensor:
        needed = int(self.source_token_ids.max()) + 1
        if weight_VD.dim() != 2 or len(weight_VD) < needed:
            raise ArtifactError(
                f"the {name} has shape {tuple(weight_VD.shape)}, but the translation needs "
                f"{needed} rows or more; use a model with the translation's source vocabulary"
            )
        return weight_VD[self.source_token_ids.to(weight_VD.device)].float().cpu()


def save_translation(
    directory: Path,
    comm: Comm,
    *,
    plans: dict[str, list[torch.Tensor]],
    source_token_ids: torch.Tensor,
    source_marginal: torch.Tensor,
    target_marginal: torch.Tensor,
    source_tokenizer_sha256: str,
    target_tokenizer_sha256: str,
    embed_scale: str,
    vocab_size: int,
    info: dict[str, Any],
) -> None:
    """Write a translation; each rank writes its own rows to the shared file system. A collective.

    Args:
        directory: must not exist; it is created atomically at the end.
        plans: by name, "plan" or "embed" and "head": this rank's rows as CSR tiles (h, U), in
            order, of total mass 1 over all ranks.
        source_token_ids, source_marginal: (R_local,), of the same rows.
        target_marginal: (U,).
        info: any JSON value: method, iterations, base model and its hash, statistics.

    Raises:
        S2T2Error: on every rank, if any rank could not write; nothing is left behind.
    """
    assert list(plans) in PLANS, f"unknown plans {list(plans)}"
    record = {
        "kind": "translation",
        "format_version": FORMAT_VERSION,
        "parts": comm.size,
        "plans": list(plans),
        "vocab_size": vocab_size,
        "embed_scale": embed_scale,
        "source_tokenizer_sha256": source_tokenizer_sha256,
        "target_tokenizer_sha256": target_tokenizer_sha256,
        "info": info,
    }
    part = {}
    for name, tiles in plans.items():
        part |= {f"{name}.{key}": tensor for key, tensor in _stacked(tiles).items()}
    part["source_token_ids"] = source_token_ids.long().cpu()
    part["source_marginal"] = source_marginal.double().cpu()
    shared = {"values": target_marginal.double().cpu()}
    temporary = directory.parent / f".{directory.name}.tmp"
    try:
        _write_together(directory, temporary, comm, record, part, shared)
    except S2T2Error:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_together(
    directory: Path,
    temporary: Path,
    comm: Comm,
    record: dict,
    part: dict[str, torch.Tensor],
    shared: dict[str, torch.Tensor],
) -> None:
    """Rank 0 creates the directory, every rank writes its part, rank 0 seals and publishes."""
    first = comm.rank == 0

    def prepare() -> None:
        if first and directory.exists():
            raise ArtifactError(f"{directory} exists; choose another folder or remove it yourself")
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write() -> dict[str, dict]:
        names = [_part_name(comm.rank, comm.size)]
        save_file(part, temporary / names[0])
        if first:
            save_file(shared, temporary / TARGET_MARGINAL)
            artifacts.write_json(temporary / RECORD, record)
            names += [TARGET_MARGINAL, RECORD]
        return artifacts.describe_files(temporary, names)

    def finish() -> None:
        if first:
            artifacts.seal(temporary, {"kind": "translation"}, files)
            artifacts.publish(temporary, directory)

    doing = f"writing {directory}"
    agree(comm, prepare, doing)
    parts = comm.gather_objects(agree(comm, write, doing))
    files = {name: entry for part in parts for name, entry in part.items()}
    agree(comm, finish, doing)


def load_translation(path: str | Path) -> Translation:
    """Read a translation and verify every file's hash and every index. No file is unpickled.

    Raises:
        ArtifactError: incomplete, altered, of another kind or version, or inconsistent.
    """
    path = Path(path)
    artifacts.verify(path)
    record = artifacts.read_json(path / RECORD)
    version = record.get("format_version")
    if record.get("kind") != "translation" or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} is a {record.get('kind')} of format {version}, "
            f"expected a translation of format {FORMAT_VERSION}; learn it again"
        )
    names = record.get("plans")
    if names not in PLANS:
        raise ArtifactError(
            f"{path} holds the plans {names}; expected one of {PLANS}; learn it again"
        )
    shards = [_read(path / _part_name(i, record["parts"])) for i in range(record["parts"])]
    target_marginal = _read(path / TARGET_MARGINAL)["values"]
    ids, mu = (
        torch.cat([s[key] for s in shards]) for key in ("source_token_ids", "source_marginal")
    )
    plans = {name: _joined(shards, name, len(target_marginal), path) for name in names}
    in_vocabulary = ((ids >= 0) & (ids < record["vocab_size"])).all()
    for plan in plans.values():
        if len(ids) != len(plan) or len(ids.unique()) != len(ids) or not in_vocabulary:
            raise ArtifactError(
                f"{path}: {len(ids)} source token ids for {len(plan)} rows; expected one distinct "
                f"id below {record['vocab_size']} for each row; learn it again"
            )
    return Translation(
        plans=plans,
        source_token_ids=ids,
        source_marginal=mu,
        target_marginal=target_marginal,
        source_tokenizer_sha256=record["source_tokenizer_sha256"],
        target_tokenizer_sha256=record["target_tokenizer_sha256"],
        embed_scale=record["embed_scale"],
        vocab_size=record["vocab_size"],
        info=record["info"],
    )


def _part_name(rank: int, size: int) -> str:
    return f"plan-{rank:05d}-of-{size:05d}.safetensors"


def _stacked(tiles: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Vertically stacked CSR tiles as the three vectors of one CSR matrix; no tiles: no rows."""
    counts = [tile.crow_indices().diff().cpu() for tile in tiles]
    indices = [tile.col_indices().int().cpu() for tile in tiles]
    values = [tile.values().detach().float().cpu() for tile in tiles]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), *counts]).cumsum(0)
    none = torch.zeros(0)
    return {
        "indptr": indptr,
        "indices": torch.cat([none.int(), *indices]),
        "values": torch.cat([none, *values]),
    }


def _joined(
    shards: list[dict[str, torch.Tensor]], name: str, columns: int, path: Path
) -> torch.Tensor:
    """One coalesced COO matrix from the parts (torch cannot multiply a transposed CSR matrix)."""
    try:
        counts, indices, values = ([shard[f"{name}.{key}"] for shard in shards] for key in CSR)
    except KeyError as error:
        raise ArtifactError(f"{path} lacks the tensor {error}; learn it again") from None
    counts = torch.cat([indptr.diff() for indptr in counts])
    indices, values = torch.cat(indices).long(), torch.cat(values)
    consistent = len(indices) == len(values) == counts.sum() and bool((counts >= 0).all())
    if not consistent or not bool(((indices >= 0) & (indices < columns)).all()):
        raise ArtifactError(
            f"{path}: the plan's indices do not describe a matrix of {columns} columns; "
            "learn it again"
        )
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 warns of the argument
        return torch.sparse_coo_tensor(
            torch.stack((rows, indices)), values, (len(counts), columns), is_coalesced=True
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not readable ({error}); learn it again") from None


def check_translation(translation: Translation, source: Path, data_metadata: dict) -> None:
    """Check that a translation is from the model's tokenizer to the data's tokenizer.

    Raises:
        DataError: it was learned for another source or target tokenizer.
    """
    pairs = {
        "source": (translation.source_tokenizer_sha256, tokenizer_sha256(source)),
        "target": (translation.target_tokenizer_sha256, data_metadata["tokenizer_sha256"]),
    }
    for side, (found, expected) in pairs.items():
        if found != expected:
            raise DataError(
                f"the translation was learned for the {side} tokenizer {found[:12]}, but this run "
                f"uses {expected[:12]}; learn a translation for this pair"
            )


def fold_translation(
    translation_dir: Path, source: Path, target: Path, data_metadata: dict
) -> None:
    """Write the model `source` with the translated vocabulary into `target`. Call on rank 0.

    Args:
        target: an existing, empty folder.

    Raises:
        ArtifactError: not a translation.
        DataError: it was learned for another source or target tokenizer.
    """
    translation = load_translation(translation_dir)
    check_translation(translation, source, data_metadata)
    apply = {"embed": translation.embed, "head": translation.head}
    ids = special_ids(data_metadata)
    fold(source, target, lambda weight, which: apply[which](weight), ids)
