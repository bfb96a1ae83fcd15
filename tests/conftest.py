"""Shared small folders: proteins, tokenizers, data and a random language model.

Everything is a function of fixed seeds, made once per session, and must not be changed by a test:
copy what you alter.
"""

import argparse
import json
import os
import pydoc
import random
import shutil
import string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rich

from data_prep.build import BuildOptions, build_shards
from data_prep.readers import RESIDUES
from data_prep.tokenizer import train_tokenizer

if TYPE_CHECKING:
    import torch

# Triton reads it when it is first imported; a library that a test loads may do that.
if not Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    os.environ.setdefault("TRITON_INTERPRET", "1")

CONTEXT = 32
PROTEIN_VOCAB = 64
SOURCE_VOCAB = 400


def write_fasta(path: Path, records: dict[str, str]) -> Path:
    """One record per id, with the rest of a UniRef header; the sequence on one line."""
    path.write_text("".join(f">{name} n=1\n{text}\n" for name, text in records.items()))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """One document per line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_source_model(
    folder: Path, tokenizer: Path, *, tied: bool = True, dtype: "torch.dtype | None" = None
) -> Path:
    """A random OLMo of two layers, width 32, with this tokenizer, as a Hugging Face folder.

    Args:
        dtype: of the stored weights; float32 by default.
    """
    import torch  # here, so that pytest's processes that make no model start at once
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=SOURCE_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4 * CONTEXT,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(17)
    OlmoForCausalLM(config).to(dtype or torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def write_motif_proteins(path: Path) -> Path:
    """400 sequences of 30 to 120 residues, made of a few motifs, so that a BPE finds units."""
    rng = random.Random(5)
    motifs = ["".join(rng.choices(RESIDUES, k=rng.randint(2, 5))) for _ in range(60)]
    lines = []
    for i in range(400):
        sequence, length = "", rng.randint(30, 120)
        while len(sequence) < length:
            sequence += rng.choice(motifs) if rng.random() < 0.7 else rng.choice(RESIDUES)
        lines.append(f">p{i}\n{sequence[:length]}\n")
    path.write_text("".join(lines))
    return path


def make_small_inputs(folder: Path) -> tuple[Path, Path]:
    """A base model and a data directory without pytest; made once per folder."""
    model, data = folder / "model", folder / "data"
    if not data.exists():
        folder.mkdir(parents=True)
        fasta = write_motif_proteins(folder / "proteins.fasta")
        train_tokenizer([fasta], folder / "source", SOURCE_VOCAB)
        train_tokenizer([fasta], folder / "target", PROTEIN_VOCAB)
        make_source_model(model, folder / "source")
        build_shards([fasta], folder / "target", data, BuildOptions(CONTEXT, 0.2))
    return model, data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is `soak` is `slow` too."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def print_width():
    """Sets how wide rich prints; otherwise it is as wide as the first test that printed found."""
    yield lambda columns: rich.reconfigure(width=columns)
    rich.reconfigure()


@pytest.fixture(scope="session")
def protein_fasta(tmp_path_factory) -> Path:
    """Made of motifs."""
    return write_motif_proteins(tmp_path_factory.mktemp("fasta") / "proteins.fasta")


@pytest.fixture(scope="session")
def protein_tokenizer(protein_fasta, tmp_path_factory) -> Path:
    """The new domain's tokenizer: 64 tokens."""
    folder = tmp_path_factory.mktemp("protein-tokenizer") / "tokenizer"
    train_tokenizer([protein_fasta], folder, PROTEIN_VOCAB)
    return folder


@pytest.fixture(scope="session")
def protein_data(protein_fasta, protein_tokenizer, tmp_path_factory) -> Path:
    """The proteins in new tokens: rows of 32 tokens, a fifth of the documents in validation."""
    folder = tmp_path_factory.mktemp("protein-data") / "data"
    build_shards([protein_fasta], protein_tokenizer, folder, BuildOptions(CONTEXT, 0.2))
    return folder


@pytest.fixture(scope="session")
def source_tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 400 tokens, trained on English from the standard library."""
    folder = tmp_path_factory.mktemp("source-tokenizer")
    documents = [pydoc.getdoc(module) for module in (argparse, json, random, shutil, string)]
    documents += [pydoc.getdoc(value) for value in vars(random.Random).values()]
    lines = [json.dumps({"text": text}) for text in dict.fromkeys(documents) if text]
    (folder / "english.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([folder / "english.jsonl"], folder / "tokenizer", SOURCE_VOCAB)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def source_model(source_tokenizer, tmp_path_factory) -> Path:
    """The base model: tied, float32, 400 tokens, width 32."""
    return make_source_model(tmp_path_factory.mktemp("source-model") / "model", source_tokenizer)


@pytest.fixture(scope="session")
def source_data(protein_fasta, source_model, tmp_path_factory) -> Path:
    """The same proteins in the base model's tokens, one for every residue."""
    folder = tmp_path_factory.mktemp("source-data") / "data"
    build_shards([protein_fasta], source_model, folder, BuildOptions(CONTEXT, 0.2, characters=True))
    return folder
