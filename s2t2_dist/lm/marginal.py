"""The probability of a text under a language model over tokens: the sum over its tokenizations.

A causal language model p gives a probability to sequences of tokens. A text x of n bytes has many:
every t = t_1 ... t_m of tokens whose texts join to x. What the model says about the text, after the
tokens c before it, is (Cao and Rimell 2021, arXiv:2109.02550)

    P(x, end | c) = sum over all t that spell x of  p(t_1 | c) p(t_2 | c t_1) ... p(end | c t)

and for a text that a row cuts off, the probability that the text goes on with x: the same sum over
all t that spell x or a text beginning with x, and no longer do so without their last token (the
cover of x: Vieira et al. 2024, arXiv:2412.03719; Phan et al. 2024, arXiv:2410.09303). Bits per byte
of one tokenization count a single term of the sum, so they are too many, by an amount that
depends on the tokenizer. -log2 P is a property of the model and the text alone: it compares models
of different tokenizers, and for a model of single characters it is the ordinary figure. Only the
tokens c before the text are taken as they are.

**What is exact.** p(. | c t) depends on all of t, so no dynamic program over positions gives the
sum; the number of terms grows exponentially with n. `marginals` goes through the bytes of the text
and holds, at each, the tokenizations of what came before ("paths"). Where no byte has more of them
than are kept, the result is the exact sum: for short texts, and for a vocabulary of single bytes.

**What is a bound.** Beyond that, `bound` sums the complete tokenizations of the best `beam` paths
at every byte, each term exact. It is never above P, so its bits are never below P's. The row's own
tokenization is always one of the paths, and alone with `beam` 1. Sets of paths are nested: the
path that `beam` k adds is chosen among descendants of the paths of `beam` k, and no choice of a
smaller beam is undone. So the bound can only rise with `beam`. It cannot rise far: k paths are
worth at most log2 k bits more than the best of them, in a text of any length.

**What is unbiased.** If 50 places of a text can each be cut in two ways, 2^50 paths count. So
`estimate` also keeps `beam` paths drawn from all the others, and gives one that is drawn with
chance q the weight w / q (see `draw`). By induction over the bytes its expectation is P; for texts
that are drawn independently, the expectation of the product is the product of all P. Markov's
inequality makes a bound of it: with probability at least 1 - d over the draws,
-log2 P <= -log2 estimate + log2(1 / d), for all texts of a split together. 10 bits buy 99.9%.

**Next bytes.** The same paths give the probability of every byte to come next (`Marginal.next`):
for each path that ends at or before a byte, the mass of the tokens that go on with the text up to
there and then with each byte. Exact where the sum is. This does not assume, as Phan et al. do, that
the model gives no probability to tokenizations that the tokenizer would not make.

Shapes: R rows, T tokens of a row, N paths, U vocabulary, B bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from s2t2_dist.lm.draw import draw
from s2t2_dist.lm.paths import PathTree
from s2t2_dist.lm.spellings import END, OTHER, Spellings

DRAWN = 1 << 62  # the beam that would keep a path that was only drawn

Seed = int | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """A text in a row: the places [first, stop) of its tokens, which spell it.

    Attributes:
        row: of the tree that reads the row.
        first: 1 or more, because a row's first token is not predicted.
        ends: the end token stands at `stop`, and belongs to the text.
    """

    row: int
    first: int
    stop: int
    ends: bool


@dataclass(frozen=True)
class Marginal:
    """Logarithms (base e) of the probability of one piece.

    Attributes:
        canonical: of the row's own tokenization.
        bound: a lower bound of the marginal; see the module.
        estimate: of its unbiased estimate, at least `bound`.
        exact: nothing was left out or drawn: `bound` and `estimate` are the marginal.
        next: (bytes + 1, 258) log of the joint probability of the text up to each byte and of what
            comes next there: one of 256 bytes, END or OTHER. None unless asked for.
    """

    canonical: float
    bound: float
    estimate: float
    exact: bool
    next: np.ndarray | None = None

    def next_probabilities(self) -> np.ndarray:
        """(bytes + 1, 258): of every next byte, END and OTHER, given the text up to each byte."""
        shifted = np.exp(self.next - self.next.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)


@dataclass(slots=True, eq=False)
class _Path:
    """A tokenization of a piece up to a byte, whose last token is not read yet.

    Attributes:
        parent: its slots without that token. Not used of the row's own tokenization.
        place: the position of that token.
        log_p: of all its tokens, exact.
        log_weight: in the unbiased sum: log_p, or more where it stands for paths not drawn.
        level: the smallest beam that keeps it.
        canonical: the row's own tokenization.
    """

    parent: int
    token: int
    place: int
    log_p: float
    log_weight: float
    level: int
    canonical: bool


@dataclass(eq=False)
class _Text:
    """What is known of one piece while its bytes are gone through.

    Attributes:
        waiting: paths by the byte at which they end.
        whole: (log_p, log_weight, level) of what spells all of the piece.
    """

    piece: Piece
    text: bytes
    tokens: list[int]  # of the row
    draws: np.random.Generator
    waiting: list[list[_Path]]
    whole: list[tuple[float, float, int]] = field(default_factory=list)
    canonical: float = 0.0
    exact: bool = True
    next: np.ndarray | None = None

    def complete(self, path: _Path, log_last: float) -> None:
        """Count a path that spells all of the piece with what has this log probability."""
        self.whole.append((path.log_p + log_last, path.log_weight + log_last, path.level))


def marginals(
    tree: PathTree,
    tokens: Sequence[list[int]],
    pieces: Sequence[Piece],
    spellings: Spellings,
    beam: int,
    seeds: Sequence[Seed],
    last_place: int | None = None,
    next_bytes: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Marginal]:
    """The marginals of pieces of a tree's rows.

    Args:
        tokens: of each row, as the tree read them.
        beam: paths that are kept at each byte, and as many again that are drawn from the others;
            with 1 the row's own tokenization alone, and nothing drawn.
        seeds: of each piece's draws. Two pieces with one seed are not drawn independently.
        last_place: one past the last position that the model has. A tokenization that needs more
            has no probability.
        next_bytes: fill in `Marginal.next`.
        advance: called with the number of bytes that were gone through.
    """
    held = [
        _start(piece, tokens[piece.row], spellings, seed, next_bytes)
        for piece, seed in zip(pieces, seeds, strict=True)
    ]
    for byte in range(max(len(each.waiting) for each in held)):
        active = [each for each in held if byte < len(each.waiting)]
        reading = [
            (each, path) for each in active for path in _select(each, byte, beam, last_place)
        ]
        _free(tree, active, reading, spellings.longest, byte)
        if reading:
            paths, log_p_NU = _read(tree, reading)
            _expand(byte, reading, paths, log_p_NU, spellings)
            if next_bytes:
                _expect(byte, reading, log_p_NU.cpu().numpy(), spellings)
        advance(sum(byte < len(each.text) for each in active))
    return [_result(each, beam) for each in held]


def _start(
    piece: Piece, tokens: list[int], spellings: Spellings, seed: Seed, next_bytes: bool
) -> _Text:
    text = b"".join(spellings.texts[i] for i in tokens[piece.first : piece.stop])
    waiting: list[list[_Path]] = [[] for _ in range(len(text) + 1)]
    waiting[0] = [_Path(0, tokens[piece.first - 1], piece.first - 1, 0.0, 0.0, 1, True)]
    found = _Text(piece, text, tokens, np.random.default_rng(seed), waiting)
    if next_bytes:
        found.next = np.full((len(text) + 1, OTHER + 1), -np.inf)
    return found


def _select(each: _Text, byte: int, beam: int, last_place: int | None) -> list[_Path]:
    """The paths to go on with at a byte."""
    found, each.waiting[byte] = each.waiting[byte], []
    if byte == len(each.text) and not each.piece.ends:
        for path in found:
            each.complete(path, 0.0)
            if path.canonical:
                each.canonical = path.log_p
        if each.next is None:
            return []
    kept = [path for path in found if path.canonical]
    others = [path for path in found if not path.canonical]
    if last_place is not None:
        others = [path for path in others if path.place < last_place]
    others.sort(key=lambda path: -path.log_p)
    for level in range(2, beam + 1):
        if not others:
            break
        while len(kept) < level:
            best = next((path for path in others if path.level <= level), None)
            if best is None:
                break
            best.level = level
            kept.append(best)
            others.remove(best)
    count = beam if beam > 1 else 0
    each.exact &= len(others) <= count
    for index, log_weight in draw(np.array([p.log_weight for p in others]), count, each.draws):
        others[index].log_weight, others[index].level = log_weight, DRAWN
        kept.append(others[index])
    return kept


def _free(
    tree: PathTree, active: list[_Text], reading: list[tuple], longest: int, byte: int
) -> None:
    """Give up the slots of paths that have no descendants left."""
    needed: dict[int, list[int]] = {each.piece.row: [] for each in active}
    for each, path in reading:
        needed[each.piece.row].append(path.parent)
    for each in active:
        for waiting in each.waiting[byte : byte + longest + 1]:
            needed[each.piece.row] += [path.parent for path in waiting]
    for row, paths in needed.items():
        tree.free(row, paths)


def _read(tree: PathTree, reading: list[tuple[_Text, _Path]]) -> tuple[list[int], torch.Tensor]:
    """The paths with their last token read, and log p of every next token, (N, U) float64."""
    rows = [each.piece.row for each, _ in reading]
    own = [n for n, (_, path) in enumerate(reading) if path.canonical]
    new = [n for n, (_, path) in enumerate(reading) if not path.canonical]
    longer = [0] * len(reading)
    for n in own:
        longer[n] = tree.row_path(reading[n][1].place)
    where = [reading[n][1].place for n in own]
    logits = [tree.logits_RTU[[rows[n] for n in own], where]]
    if new:
        chosen = [reading[n][1] for n in new]
        found, read_NU = tree.extend(
            [rows[n] for n in new],
            [path.token for path in chosen],
            [path.place for path in chosen],
            [path.parent for path in chosen],
        )
        for n, path in zip(new, found, strict=True):
            longer[n] = path
        logits.append(read_NU)
    log_p_NU = torch.empty(len(reading), logits[0].shape[1], dtype=torch.float64)
    log_p_NU = log_p_NU.to(logits[0].device)
    log_p_NU[own + new] = torch.cat(logits).double().log_softmax(dim=1)
    return longer, log_p_NU


def _expand(
    byte: int,
    reading: list[tuple[_Text, _Path]],
    paths: list[int],
    log_p_NU: torch.Tensor,
    spellings: Spellings,
) -> None:
    """Continue every path by every token that spells what comes next, or end it."""
    wanted: list[tuple[int, int, int]] = []  # path, token, byte at which the token ends
    following: dict[int, list[tuple[int, int]]] = {}
    for n, (each, path) in enumerate(reading):
        left = len(each.text) - byte
        if left and id(each) not in following:
            following[id(each)] = list(spellings.next_tokens(each.text, byte))
        if left:
            wanted += [(n, token, end) for token, end in following[id(each)]]
        elif each.piece.ends:
            wanted.append((n, spellings.end_id, byte))
        if 0 < left < spellings.longest and not each.piece.ends:
            reaching = spellings.beginning_with(each.text[byte:])
            beyond = spellings.bytes_UB[reaching, left] < END
            ids = spellings.order[reaching][beyond]
            if len(ids):
                each.complete(path, float(log_p_NU[n, ids].logsumexp(0)))
    if not wanted:
        return
    index = torch.tensor([(n, token) for n, token, _ in wanted], device=log_p_NU.device)
    log_ps = log_p_NU[index[:, 0], index[:, 1]].tolist()
    for (n, token, end), log_p in zip(wanted, log_ps, strict=True):
        each, path = reading[n]
        if end == byte:
            each.complete(path, log_p)
            if path.canonical:
                each.canonical = path.log_p + log_p
            continue
        canonical = path.canonical and token == each.tokens[path.place + 1]
        if log_p > -np.inf or canonical:
            sums = (path.log_p + log_p, path.log_weight + log_p)
            longer = _Path(paths[n], token, path.place + 1, *sums, path.level, canonical)
            each.waiting[end].append(longer)


def _expect(
    byte: int, reading: list[tuple[_Text, _Path]], log_p_NU: np.ndarray, spellings: Spellings
) -> None:
    """Add each path's mass to what comes next, at this byte and inside the token after it."""
    for (each, path), log_p_U in zip(reading, log_p_NU, strict=True):
        found = each.next
        others = np.concatenate([log_p_U[spellings.silent], log_p_U[len(spellings.texts) :]])
        for column, log_mass in (
            (END, log_p_U[spellings.end_id]),
            (OTHER, np.logaddexp.reduce(others, initial=-np.inf)),
        ):
            found[byte, column] = np.logaddexp(found[byte, column], path.log_weight + log_mass)
        for at in range(byte, min(byte + spellings.longest, len(each.text) + 1)):
            reaching = spellings.beginning_with(each.text[byte:at])
            mass = np.bincount(
                spellings.bytes_UB[reaching, at - byte],
                np.exp(log_p_U[spellings.order[reaching]]),
                minlength=END + 1,
            )
            with np.errstate(divide="ignore"):
                log_mass = np.log(mass[:END]) + path.log_weight
            found[at, :END] = np.logaddexp(found[at, :END], log_mass)


def _result(each: _Text, beam: int) -> Marginal:
    log_p, log_weight, level = (np.array(column) for column in zip(*each.whole, strict=True))
    estimate = float(np.logaddexp.reduce(log_weight))
    bound = estimate if each.exact else float(np.logaddexp.reduce(log_p[level <= beam]))
    return Marginal(each.canonical, bound, estimate, each.exact, each.next)
