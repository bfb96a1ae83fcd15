"""A model folder as its checks see it: config, tokenizer and tensors, read at first use."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from s2t2_dist import artifacts
from s2t2_dist.data.shards import TOKENIZER_JSON
from s2t2_dist.lm.architecture import read_config
from s2t2_dist.lm.folder import LoadingReport, WeightFiles, loading_report
from s2t2_dist.lm.tokenizer import read_tokenizer

# Manifest key: ids of tokens that no training row contained. Their embeddings may be equal.
UNTRAINED = "untrained_token_ids"


class CheckError(Exception):
    """A check failed; the message is the problem."""


class ModelFolder:
    """A model folder whose parts are read at first use.

    Args:
        untrained: see `verify.verify_model`.
    """

    def __init__(self, path: Path, untrained: Iterable[int] | None):
        self.path = path
        if untrained is None and artifacts.is_complete(path):
            untrained = artifacts.read_json(path / artifacts.MANIFEST).get(UNTRAINED)
        self.untrained = frozenset(untrained or ())

    @cached_property
    def config(self):
        return read_config(self.path)

    @property
    def text(self):
        """The config of the language model, which may be a part of the whole."""
        return self.config.get_text_config()

    @cached_property
    def tokenizer(self):
        if not (self.path / TOKENIZER_JSON).is_file():
            raise CheckError(f"{TOKENIZER_JSON} is missing")
        return read_tokenizer(self.path)

    @cached_property
    def token_ids(self) -> list[int]:
        return sorted(self.tokenizer.get_vocab().values())

    @cached_property
    def generation(self):
        if not (self.path / "generation_config.json").is_file():
            raise CheckError("generation_config.json is missing")
        return GenerationConfig.from_pretrained(self.path)

    @cached_property
    def weights(self) -> WeightFiles:
        return WeightFiles(self.path)

    @cached_property
    def in_files(self) -> dict[str, tuple[list[int], str]]:
        """Shape and safetensors dtype of every tensor in the files."""
        tensors = {}
        for file in sorted(set(self.weights.file_of.values())):
            with safe_open(self.path / file, "pt") as f:
                for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = f.get_slice(name)
                    tensors[name] = (view.get_shape(), view.get_dtype())
        return tensors

    @cached_property
    def report(self) -> LoadingReport:
        return loading_report(self.path)

    @property
    def matrices(self) -> dict[str, str]:
        """Role ("embedding", "LM head") -> name of the weight in the architecture."""
        weights = self.weights.vocabulary
        named = {"embedding": weights.embed}
        return named if weights.tied else {**named, "LM head": weights.head}

    @cached_property
    def converted(self) -> dict[str, torch.Tensor] | None:
        """Every tensor, loaded by transformers, where the files hold them in another form."""
        if self.weights.as_stored or self.report.missing:
            return None
        return AutoModelForCausalLM.from_pretrained(
            self.path, dtype="auto", trust_remote_code=False
        ).state_dict()

    @property
    def names(self) -> list[str]:
        """Names of the tensors that `read` gives, in the architecture's form."""
        return list(self.in_files if self.converted is None else self.converted)

    def read(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise CheckError(f"{name} is not in the files")
        return self.weights.read(name) if self.converted is None else self.converted[name]

    def describe(self, ids: list[int]) -> str:
        shown = [f"{i} {self.tokenizer.convert_ids_to_tokens(i)!r}" for i in ids[:4]]
        return ", ".join(shown) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
