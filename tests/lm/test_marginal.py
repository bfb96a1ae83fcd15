"""Marginals over tokenizations against an enumeration, and, where it is too long, a recursion.

Models are in float64: a sum of some thousand products of probabilities is off by 1e-13.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from s2t2_dist.lm.draw import draw
from s2t2_dist.lm.marginal import Piece, marginals
from s2t2_dist.lm.paths import PathTree, last_position
from s2t2_dist.lm.spellings import END, OTHER, Spellings
from tests.lm.tokenizations import Oracle

TOLERANCE = 1e-10
ALL = 100_000  # a beam that keeps every tokenization of 12 letters
# End, padding, and tokens that overlap in every way; two of them spell the same.
TEXTS = [b"", b"", b"a", b"b", b"ab", b"ba", b"aa", b"aba", b"bab", b"abab", b"b", b"aab", b"c"]
END_ID = 0
SPELLINGS = Spellings(TEXTS, END_ID)


def make_model(seed, sharp=3.0, kind="olmo"):
    """A random causal model over TEXTS in float64, its weights `sharp` times the usual."""
    size = {"vocab_size": len(TEXTS), "max_position_embeddings": 64, "eos_token_id": END_ID}
    size |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "pad_token_id": 1}
    size["bos_token_id"] = END_ID
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    torch.manual_seed(seed)
    made = {
        "olmo": lambda: OlmoForCausalLM(OlmoConfig(**size)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**size, **grouped)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**size, **grouped, sliding_window=32)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**size, n_positions=64)),
    }[kind]()
    with torch.no_grad():
        for weight in made.double().parameters():
            weight.mul_(sharp)
    return made.eval().requires_grad_(False)


class BigramTree:
    """A model whose next token depends on the last alone, as a tree of paths."""

    def __init__(self, logits_UU, rows):
        self.table, self.logits_RTU = logits_UU, logits_UU[torch.tensor(rows)]

    def row_path(self, place):
        return 0

    def free(self, row, paths):
        pass

    def extend(self, rows, tokens, places, paths):
        return [0] * len(rows), self.table[torch.tensor(tokens)]


def bigram_document(logits_UU, context, text):
    """log P(text, end) of a bigram model, by the recursion over bytes that it allows."""
    log_p = logits_UU.log_softmax(1).numpy()
    reached = np.full((len(text) + 1, len(TEXTS)), -np.inf)  # by byte and last token
    reached[0, context[-1]] = 0
    for at in range(1, len(text) + 1):
        for token, piece in enumerate(TEXTS):
            if piece and text[:at].endswith(piece):
                before = reached[at - len(piece)] + log_p[:, token]
                reached[at, token] = np.logaddexp.reduce(before)
    return float(np.logaddexp.reduce(reached[-1] + log_p[:, END_ID]))


def random_text(length, seed):
    return "".join(np.random.default_rng(seed).choice(list("ab"), length)).encode()


def tokenize(text, seed):
    """Any tokenization."""
    rng, tokens = np.random.default_rng(seed), []
    while text:
        fitting = [i for i, piece in enumerate(TEXTS) if piece and text.startswith(piece)]
        tokens.append(int(rng.choice(fitting)))
        text = text[len(TEXTS[tokens[-1]]) :]
    return tokens


def make_row(context, text, seed=0, ends=True):
    """A row whose last piece is the text in some tokenization, and the piece."""
    own = tokenize(text, seed)
    piece = Piece(0, len(context), len(context) + len(own), ends)
    return [*context, *own, *[END_ID] * ends], piece


def score(lm, row, piece, beam, seed=0, last=None):
    """The marginal of one piece of one row."""
    tree = PathTree(lm, torch.tensor([row]))
    return marginals(tree, [row], [piece], SPELLINGS, beam, [seed], last, next_bytes=True)[0]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("length", "seed"), [(1, 0), (2, 1), (6, 2), slow(10, 3), slow(12, 4), slow(12, 5), slow(12, 6)]
)
@pytest.mark.parametrize("ends", [True, False], ids=["document", "cut"])
def test_equals_brute_force(length, seed, ends):
    lm, text = make_model(seed), random_text(length, seed)
    context = [END_ID] if seed % 2 else [3, 2, END_ID, 5]
    row, piece = make_row(context, text, seed, ends)
    found = score(lm, row, piece, ALL)
    oracle = Oracle(lm, context, TEXTS)
    expected = oracle.document(text) if ends else oracle.beginning(text)
    assert found.exact
    assert found.bound == found.estimate == pytest.approx(expected, abs=TOLERANCE)
    log_p = lm(torch.tensor([row])).logits[0].log_softmax(1)
    own = sum(float(log_p[i - 1, row[i]]) for i in range(piece.first, len(row)))
    assert found.canonical == pytest.approx(own, abs=TOLERANCE)
    assert length < 3 or expected - own > 0.1, "the sum must matter"


@pytest.mark.parametrize(("length", "seed"), [(1, 0), (4, 1), slow(5, 2), slow(9, 3)])
def test_next_bytes_equal_brute_force_and_sum_to_one(length, seed):
    lm, text = make_model(seed), random_text(length, seed)
    found = score(lm, *make_row([END_ID], text, seed), ALL)
    oracle = Oracle(lm, [END_ID], TEXTS)
    shares = found.next_probabilities()
    assert shares.sum(axis=1) == pytest.approx(1, abs=1e-12)
    for at in range(length + 1):
        before = text[:at]
        reached = oracle.beginning(before)
        # The columns together are all that can follow: no mass is lost or counted twice.
        assert np.logaddexp.reduce(found.next[at]) == pytest.approx(reached, abs=TOLERANCE)
        expected = np.zeros(OTHER)
        for byte in b"abc":
            expected[byte] = math.exp(oracle.beginning(before + bytes([byte])) - reached)
        expected[END] = math.exp(oracle.document(before) - reached)
        assert shares[at, :OTHER] == pytest.approx(expected, abs=TOLERANCE)
    assert shares[:, OTHER].max() > 0
    # The chain rule: what comes next at each place multiplies to the marginal.
    own = [math.log(shares[at, byte]) for at, byte in enumerate(text)]
    assert sum(own) + math.log(shares[-1, END]) == pytest.approx(found.bound, abs=TOLERANCE)


@pytest.mark.parametrize(("length", "seed"), [(5, 0), slow(10, 1), slow(10, 2), slow(10, 3)])
@pytest.mark.parametrize("ends", [True, False], ids=["document", "cut"])
def test_the_bound_rises_with_the_beam_to_the_marginal(length, seed, ends):
    lm, text = make_model(seed), random_text(length, seed)
    oracle = Oracle(lm, [END_ID], TEXTS)
    exact = oracle.document(text) if ends else oracle.beginning(text)
    row, piece = make_row([END_ID], text, seed, ends)
    found = [score(lm, row, piece, beam) for beam in (*range(1, 3 * length), ALL)]
    bounds = [each.bound for each in found]
    # Equal sets of paths are summed in another order: 1e-12 is a hundred times what that changes.
    assert all(before <= after + 1e-12 for before, after in pairwise(bounds))
    assert max(bounds) <= exact + TOLERANCE
    assert bounds[-1] == pytest.approx(exact, abs=TOLERANCE)
    assert all(one.canonical <= one.bound + 1e-12 <= one.estimate + 2e-12 for one in found)
    assert not ends or bounds[0] == pytest.approx(found[0].canonical, abs=1e-12)
    assert not found[2].exact and found[-1].exact
    assert bounds[0] < bounds[2] < bounds[-1], "the beam must matter"


@pytest.mark.parametrize(("length", "seed"), [(100, 0), slow(200, 1), slow(200, 2)])
def test_a_long_text_is_bounded_and_estimated(length, seed):
    """Some 1e30 tokenizations for 100 letters: only a bigram model has an exact sum."""
    logits_UU = torch.randn(
        len(TEXTS), len(TEXTS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    text = random_text(length, seed)
    row, piece = make_row([END_ID], text, seed)
    exact = bigram_document(logits_UU, [END_ID], text)

    def found(beam, draws):
        tree = BigramTree(logits_UU, [row])
        return marginals(tree, [row], [piece], SPELLINGS, beam, [draws])[0]

    bounds = [found(beam, 0) for beam in (1, 2, 8)]
    assert all(a.bound <= b.bound + 1e-9 for a, b in pairwise(bounds))
    assert bounds[0].bound == pytest.approx(bounds[0].canonical)
    assert bounds[-1].bound < exact - 5, "k paths cannot be worth more than log2 k bits"
    estimates = np.array([found(8, draws).estimate for draws in range(8)])
    # Markov's inequality, of which the report makes its bound: once in 1,000.
    assert (estimates - math.log(1000) <= exact).all()
    assert abs(np.logaddexp.reduce(estimates) - math.log(8) - exact) < 0.5
    assert estimates.std() < 1 < 0.1 * (exact - bounds[0].canonical)


def test_a_short_text_of_a_bigram_model_equals_the_recursion():
    """The two oracles agree, so that the recursion can stand for the enumeration."""
    logits_UU = torch.randn(len(TEXTS), len(TEXTS), dtype=torch.float64)
    row, piece = make_row([END_ID], b"abaabbab")
    tree = BigramTree(logits_UU, [row])
    found = marginals(tree, [row], [piece], SPELLINGS, ALL, [0])[0]
    expected = bigram_document(logits_UU, [END_ID], b"abaabbab")
    assert found.exact and found.bound == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("beam", [2, pytest.param(3, marks=pytest.mark.soak)])
def test_the_estimate_is_unbiased(beam):
    """The mean of 600 draws is within 4 standard errors of the exact sum."""
    lm, text = make_model(5, sharp=2.5), random_text(9, 3)
    exact = Oracle(lm, [END_ID], TEXTS).document(text)
    row, piece = make_row([END_ID], text)
    found = [score(lm, row, piece, beam, seed) for seed in range(600)]
    ratios = np.exp([each.estimate - exact for each in found])
    assert not any(each.exact for each in found)
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    assert 1e-3 < error < 0.05
    assert abs(ratios.mean() - 1) < 4 * error


@pytest.mark.parametrize("seed", range(5))
def test_draws_keep_every_expected_weight(seed):
    rng = np.random.default_rng(seed)
    log_weights = rng.normal(size=12) * (1 + seed)
    count, times = 3 + seed % 3, 2000
    total = np.zeros(12)
    for _ in range(times):
        drawn = draw(log_weights, count, rng)
        assert len({index for index, _ in drawn}) == len(drawn) == count
        for index, log_weight in drawn:
            assert log_weight >= log_weights[index] - 1e-12
            total[index] += math.exp(log_weight)
    # A weight of w is drawn as at most `unit` with chance at least w / unit, which bounds the
    # variance of a draw by w times unit.
    unit = np.exp(log_weights).sum() / count
    allowed = 5 * np.sqrt(np.exp(log_weights) * unit / times)
    assert (abs(total / times - np.exp(log_weights)) <= allowed).all()


def test_draws_of_few_or_vanishing_weights():
    rng = np.random.default_rng(0)
    assert draw(np.array([-1.0, -2.0]), 2, rng) == [(0, -1.0), (1, -2.0)]
    assert draw(np.array([-1.0, -2.0]), 0, rng) == []
    assert draw(np.array([-1e5, -1.0, -1e5]), 2, rng)[0] == (1, -1.0)
    assert draw(np.zeros(0), 2, rng) == []


def test_positions_that_a_model_does_not_have_are_no_path():
    lm, text, last = make_model(1, kind="gpt2"), b"ababab", 4  # 3 tokens of the text are read
    row, piece = [END_ID, 9, 4, END_ID], Piece(0, 1, 3, True)
    found = score(lm, row, piece, ALL, last=last)
    oracle = Oracle(lm, [END_ID], TEXTS)
    short = [log_p for tokens, log_p in oracle.enumerate(text)[0] if len(tokens) < last]
    assert len(short) > 1
    assert found.exact
    assert found.bound == pytest.approx(np.logaddexp.reduce(short), abs=TOLERANCE)
    assert found.bound < oracle.document(text) - 1e-6


def test_pieces_do_not_depend_on_what_else_is_scored():
    """Three rows with five pieces at once, drawn from at every byte, equal each by itself."""
    lm = make_model(7)
    texts = [[b"abab", b"babaab"], [b"aabab"], [b"b", b"ababbaba"]]
    rows, pieces = [], []
    for number, held in enumerate(texts):
        rows.append([END_ID])
        for text in held:
            first = len(rows[-1])
            rows[-1] += [*tokenize(text, number), END_ID]
            pieces.append(Piece(number, first, len(rows[-1]) - 1, True))
    for row in rows:
        row += [1] * (max(map(len, rows)) - len(row))
    tree = PathTree(lm, torch.tensor(rows))
    together = marginals(tree, rows, pieces, SPELLINGS, 2, range(5))
    for seed, (piece, found) in enumerate(zip(pieces, together, strict=True)):
        row = rows[piece.row]
        alone = score(lm, row, Piece(0, piece.first, piece.stop, True), 2, seed)
        assert found.bound == pytest.approx(alone.bound, abs=TOLERANCE)
        assert found.estimate == pytest.approx(alone.estimate, abs=TOLERANCE)
    assert not all(each.exact for each in together)


@pytest.mark.parametrize("kind", ["olmo", slow("qwen3"), slow("gemma3"), "gpt2"])
def test_the_tree_equals_plain_passes(kind):
    lm = make_model(2, sharp=1.5, kind=kind)
    assert last_position(lm) == {"gpt2": 64, "gemma3": 32}.get(kind)
    rows = torch.randint(len(TEXTS), (3, 9), generator=torch.Generator().manual_seed(3))
    tree = PathTree(lm, rows)
    with torch.no_grad():
        plain = lm(rows, use_cache=False).logits
    assert torch.allclose(tree.logits_RTU, plain, rtol=0, atol=1e-12)
    paths = [
        (row, rows[row, : place + 1].tolist(), tree.row_path(place))
        for row, place in ((0, 3), (0, 3), (2, 8))
    ]
    for step in range(23):  # 9 + 3 * 23 tokens are more than the tree has slots for at first
        tokens = [(step + 5 * n) % len(TEXTS) for n in range(len(paths))]
        longer, logits = tree.extend(
            [row for row, _, _ in paths],
            tokens,
            [len(said) for _, said, _ in paths],
            [path for *_, path in paths],
        )
        paths = [
            (row, [*said, token], path)
            for (row, said, _), token, path in zip(paths, tokens, longer, strict=True)
        ]
        if step == 20:
            paths = paths[1:]
            tree.free(0, [paths[0][2]])
        for (_, said, _), found in zip(paths, logits[-len(paths) :], strict=True):
            with torch.no_grad():
                expected = lm(torch.tensor([said]), use_cache=False).logits[0, -1]
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)
