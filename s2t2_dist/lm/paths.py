"""Next-token logits of many token paths that leave rows of tokens: a tree over each row.

The keys and values of every token read lie in slots. A new token sees the slots of its own path
and no other, by a mask, and stands at the position that its path gives it. So any number of paths
share a row, and a path costs one token at a time.

The rows themselves are read the same way: in two parts, their slots in reverse. Their logits equal
those of a plain pass only if the model takes the mask, the positions and the slots as they are
meant; `report.marginal` compares the two for every row it scores.

Shapes: R rows, T tokens of a row, Q new tokens of a row, N paths, S slots, U vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

# Rotary positions that are the same function at any position, whatever else is in the batch.
ENDLESS = {"default", "linear", "llama3", "yarn"}
BLOCK = 64  # slots by which the tree grows


class _Slots(CacheLayerMixin):
    """Keys and values (R, heads, S, width) of one layer, written where the tree says."""

    slots_RQ: torch.Tensor
    count: int

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.count, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if more := self.count - self.keys.shape[2]:
            grow = (0, 0, 0, more)
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)
        index = self.slots_RQ[:, None, :, None]
        self.keys.scatter_(2, index.expand_as(key_states), key_states)
        self.values.scatter_(2, index.expand_as(value_states), value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.count, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def last_position(lm: PreTrainedModel) -> int | None:
    """How many tokens a path may have; None if any number.

    Tables of positions end, some rotary scalings depend on the longest path of a pass, and a path
    longer than a sliding window would see all of itself here.
    """
    config = lm.config.get_text_config()
    ends = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    if not rope or any(one.get("rope_type") not in ENDLESS for one in each):
        ends.append(getattr(config, "max_position_embeddings", None))
    return min((end for end in ends if end is not None), default=None)


class PathTree:
    """Reads rows, and then any tokens that continue a path through them.

    A path is an integer whose bit s is set if the token in slot s belongs to it.

    Attributes:
        logits_RTU: next-token logits of the rows, in the model's dtype.

    Args:
        lm: a causal language model of transformers whose layers attend to all tokens before.
        input_ids_RT: the rows, int64, on the model's device.
    """

    def __init__(self, lm: PreTrainedModel, input_ids_RT: torch.Tensor):
        self._lm = lm
        rows, self._length = input_ids_RT.shape
        layers = lm.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_Slots() for _ in range(layers)])
        self._size = self._length + BLOCK  # the last slot takes what is padding
        self._used = [(1 << self._length) - 1] * rows
        half = (self._length + 1) // 2
        parts = []
        for places in (range(half), range(half, self._length)):
            if places:
                ids_RQ = input_ids_RT[:, places.start : places.stop]
                reads = [[(place, self._slot(place), self.row_path(place)) for place in places]]
                parts.append(self._forward(ids_RQ, reads * rows))
        self.logits_RTU = torch.cat(parts, dim=1)

    def _slot(self, place: int) -> int:
        return self._length - 1 - place

    def row_path(self, place: int) -> int:
        """The path of a row's tokens up to and with this place."""
        return ((1 << (place + 1)) - 1) << self._slot(place)

    def free(self, row: int, paths: Sequence[int]) -> None:
        """Give up every slot of a row that neither these paths nor the row itself need."""
        kept = (1 << self._length) - 1
        for path in paths:
            kept |= path
        self._used[row] = kept

    def extend(
        self, rows: Sequence[int], tokens: Sequence[int], places: Sequence[int], paths: list[int]
    ) -> tuple[list[int], torch.Tensor]:
        """Read one more token on each of N paths.

        Args:
            rows: the row that each path belongs to.
            places: the position of the new token: the number of tokens before it.
            paths: without the new token.

        Returns:
            The paths with their new token, and the logits (N, U) after it.
        """
        reads: list[list] = [[] for _ in self._used]
        ids: list[list[int]] = [[] for _ in self._used]
        longer, where = [], []
        for row, token, place, path in zip(rows, tokens, places, paths, strict=True):
            slot = self._take(row)
            longer.append(path | 1 << slot)
            where.append((row, len(ids[row])))
            ids[row].append(token)
            reads[row].append((place, slot, longer[-1]))
        most = max(map(len, ids))
        for row, held in enumerate(ids):
            held += [0] * (most - len(held))
            trash = self._size - 1
            reads[row] += [(0, trash, 1 << trash)] * (most - len(reads[row]))
        ids_RQ = torch.tensor(ids, device=self.logits_RTU.device)
        logits_RQU = self._forward(ids_RQ, reads)
        index = torch.tensor(where, device=logits_RQU.device)
        return longer, logits_RQU[index[:, 0], index[:, 1]]

    def _take(self, row: int) -> int:
        """The lowest free slot of a row; the tree grows where there is none."""
        used = self._used[row]
        slot = (~used & (used + 1)).bit_length() - 1
        self._used[row] = used | 1 << slot
        while slot >= self._size - 1:
            self._size += BLOCK
        return slot

    @torch.no_grad()
    def _forward(self, ids_RQ: torch.Tensor, reads: list[list[tuple]]) -> torch.Tensor:
        """Logits (R, Q, U); `reads` gives position, slot and path of every token."""
        device, width = ids_RQ.device, self._size // 8 + 1
        bits = b"".join(path.to_bytes(width, "little") for row in reads for *_, path in row)
        seen = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        seen_RQS = torch.from_numpy(seen).reshape(*ids_RQ.shape, -1)[:, :, : self._size]
        mask_RQS = torch.zeros(seen_RQS.shape, dtype=self._lm.dtype)
        mask_RQS.masked_fill_(seen_RQS == 0, torch.finfo(self._lm.dtype).min)
        for layer in self._cache.layers:
            layer.count = self._size
            layer.slots_RQ = torch.tensor([[s for _, s, _ in row] for row in reads]).to(device)
        places_RQ = torch.tensor([[place for place, _, _ in row] for row in reads]).to(device)
        return self._lm(
            input_ids=ids_RQ,
            attention_mask=mask_RQS[:, None].to(device),
            position_ids=places_RQ,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
